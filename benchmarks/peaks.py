"""How much memory a piece of a program takes: on a GPU what is allocated, on a CPU the resident size."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Fixed thresholds: glibc would otherwise learn to keep ever larger blocks, and torch's freed tensors with them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MIB = 2**20


@dataclass
class Phase:
    """Bytes before, after, and at most meanwhile."""

    before: int = 0
    after: int = 0
    peak: int = 0

    @property
    def over(self) -> int:
        """What was needed only for a while."""
        return max(0, self.peak - max(self.before, self.after))


@contextmanager
def phase(*, on_gpu: bool = False) -> Iterator[Phase]:
    """Measure what happens inside; the figures are there after it.

    A CPU's are those of a process that was started with `ALLOCATOR`: others keep what was freed.
    """
    measured = Phase(before=level(on_gpu=on_gpu))
    _reset_peak(on_gpu)
    yield measured
    measured.peak = _peak(on_gpu)
    measured.after = level(on_gpu=on_gpu)


def level(*, on_gpu: bool = False) -> int:
    """Bytes in use now, garbage collected."""
    gc.collect()
    if not on_gpu:
        return _status("VmRSS")
    import torch

    return torch.cuda.memory_allocated()


def in_fresh_process(module: str, arguments: Sequence[str]) -> Any:
    """Run `python -m module` with `arguments` in a process whose allocator returns freed memory to the system.

    Returns:
        The JSON value in the last line that it prints.
    """
    command, environment = [sys.executable, "-m", module, *arguments], os.environ | ALLOCATOR
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
    return json.loads(result.stdout.splitlines()[-1])


def _reset_peak(on_gpu: bool) -> None:
    if not on_gpu:
        Path("/proc/self/clear_refs").write_text("5")
        return
    import torch

    torch.cuda.reset_peak_memory_stats()


def _peak(on_gpu: bool) -> int:
    if not on_gpu:
        return _status("VmHWM")
    import torch

    return torch.cuda.max_memory_allocated()


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
