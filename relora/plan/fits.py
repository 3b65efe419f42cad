"""Which GPUs a run fits, and with how large a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from relora.plan.memory import StageMemory

GIB = 2**30
COMMON_GPUS_GIB = (24, 40, 80, 141)
# What is not ours to use: the CUDA context, the libraries' workspaces, and what the allocator cannot fill.
RESERVED_SHARE = 0.08


@dataclass(frozen=True)
class Line:
    """The peak of a stage over the batch: at least `floor`, and base + slope * samples."""

    floor: int
    base: float
    slope: float

    def at(self, batch_size: int) -> float:
        return max(self.floor, self.base + self.slope * batch_size)


@dataclass(frozen=True)
class Fit:
    """One size of GPU.

    Attributes:
        largest: the largest batch per device that fits each stage, None where not even one sample does.
        usable: the largest that fits all stages and divides the global batch.
    """

    gib: float
    largest: dict[str, int | None]
    usable: int | None


def line_through(small: StageMemory, large: StageMemory, small_batch: int, large_batch: int) -> Line:
    """Through the peaks of an update at two batches; what does not depend on the batch is the floor."""
    slope = (large.update - small.update) / (large_batch - small_batch)
    floor = max(small.restart or 0, small.save)
    return Line(floor, small.update - slope * small_batch, slope)


def fit(gib: float, lines: dict[str, Line], divisors: Sequence[int]) -> Fit:
    """What fits a GPU of `gib`.

    Args:
        divisors: batches per device that divide the global batch, ascending.
    """
    room = gib * GIB * (1 - RESERVED_SHARE)
    largest = {stage: _largest(line, room) for stage, line in lines.items()}
    usable = [size for size in divisors if all(line.at(size) <= room for line in lines.values())]
    return Fit(gib, largest, max(usable, default=None))


def divisors_of(global_batch_size: int, num_processes: int) -> list[int]:
    """The batches per device that `training.global_batch_size` allows on so many processes."""
    share = global_batch_size // num_processes
    return [size for size in range(1, share + 1) if global_batch_size % (size * num_processes) == 0]


def _largest(line: Line, room: float) -> int | None:
    if line.at(1) > room:
        return None
    assert line.slope > 0, "a larger batch takes more memory"
    return int((room - line.base) / line.slope)
