"""The first process looks after its run: a heartbeat in status.json, the file STOP, the time limit, a watchdog."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from relora.checkpoint.format import BEAT_S, TEMPORARY_PREFIX
from relora.checkpoint.run_folder import RunFolder
from relora.engines.flight_record import write_flight_record
from relora.engines.heartbeat import NOTHING_MOVED
from relora.errors import EXIT_FAILED
from relora.train.signals import StopRequest

LOOK_S = 1.0
# The interpreter's own watchdog needs no lock of Python's: it ends a process whose C code keeps that lock.
EXTRA_S = 60.0


@dataclass
class Watch:
    """What two threads see of a run: one looks at the disk, one, which never waits for a disk, at the clock.

    Attributes:
        expected_save_s: how long the next checkpoint may take.
        tell_others: lets the other processes end too, and print their stacks.
        longest_s: the longest time between two moves so far: of a batch, a restart, a part of a checkpoint.
    """

    folder: RunFolder
    request: StopRequest
    max_hours: float | None
    timeout_minutes: float | None
    expected_save_s: Callable[[], float]
    tell_others: Callable[[str], object]
    moved_s: float = field(default_factory=time.monotonic)
    longest_s: float = 0.0
    num_bytes: int = 0
    _seen: tuple[int, int] = (0, 0)

    def look_at_disk(self) -> None:
        """Heartbeat, the file STOP, and the growth of a checkpoint that is being written."""
        with suppress(OSError):
            if time.time() - self.folder.status.stat().st_mtime > BEAT_S:
                os.utime(self.folder.status)
        with suppress(OSError):
            # Elsewhere nobody would look at the request.
            if self.request.postpones and self.folder.stop.exists():
                self.request.note(f"found {self.folder.stop}")
        with suppress(OSError):
            drafts = self.folder.checkpoints.glob(f"{TEMPORARY_PREFIX}*/*")
            self.num_bytes = sum(path.stat().st_size for path in drafts)

    def look_at_clock(self) -> None:
        """The time limit, and the time since anything has moved."""
        now_s, seen = time.monotonic(), (self.request.num_moves, self.num_bytes)
        if not self.request.postpones:  # a model is built or exported: whoever waits for that sees it
            self.moved_s = now_s
            return
        if seen != self._seen:
            self.longest_s = max(self.longest_s, now_s - self.moved_s)
            self._seen, self.moved_s = seen, now_s
            if self.timeout_minutes is not None:
                faulthandler.dump_traceback_later(60 * self.timeout_minutes + EXTRA_S, exit=True, file=2)
        if self.timeout_minutes is not None and now_s - self.moved_s > 60 * self.timeout_minutes:
            faulthandler.dump_traceback(file=2)
            write_flight_record()
            reason = f"{NOTHING_MOVED} {self.timeout_minutes:g} minutes (training.timeout_minutes)"
            self.tell_others(reason)
            self.request.end(EXIT_FAILED, "failed", reason)
        if self.max_hours is not None:
            # Time for the batch in progress, and one more, and the checkpoint.
            needed_s = 2 * self.longest_s + self.expected_save_s()
            if now_s - self.request.start_s + needed_s > 3600 * self.max_hours:
                self.request.note(f"training.max_hours = {self.max_hours:g} is reached")


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Both threads look until the end of the block."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            watch.look_at_disk()

    threading.Thread(target=look, name="watch disk", daemon=True).start()
    watch.request.checks.append(watch.look_at_clock)
    try:
        yield
    finally:
        ended.set()
        watch.request.checks.remove(watch.look_at_clock)
        faulthandler.cancel_dump_traceback_later()
