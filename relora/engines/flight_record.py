"""torch's flight recorder: its record of the last collectives of this process, as a file."""

import os
import threading
from contextlib import suppress
from pathlib import Path

from torch import distributed
from torch._C import _distributed_c10d

WRITE_S = 5.0  # the recorder asks the GPU which collectives are done, and a GPU may hang


def write_flight_record() -> None:
    """Write the record where NCCL's own watchdog would, at the place that the launcher names; without one nowhere.

    NCCL's watchdog writes it when a collective exceeds the time limit of its group; the watchdog of a run ends the run
    before that. `torchfrtrace` compares the files of all processes.
    """
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    if prefix is not None:
        path = Path(prefix + os.environ.get("RANK", "0"))
        writer = threading.Thread(target=_write, args=(path,), daemon=True)
        writer.start()
        writer.join(WRITE_S)


def _write(path: Path) -> None:
    # NCCL's collectives and those of other backends are recorded apart; only builds for CUDA have the former.
    is_nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"
    record: bytes = getattr(_distributed_c10d, "_dump_nccl_trace" if is_nccl else "_dump_fr_trace")()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record)
