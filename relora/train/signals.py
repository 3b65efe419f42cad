"""Requests to stop: the first signal is noted or interrupts, a second one ends the process at once.

A Python signal handler cannot do the second: it runs in the main thread, between two bytecode instructions, and that
thread may be blocked in a collective for hours. So the interpreter writes the number of each signal to a pipe the
moment it arrives, in whichever thread that is (`signal.set_wakeup_fd`), and a thread of our own reads them.
"""

import ctypes
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from relora.errors import EXIT_STOPPED, Stopped, leave_for_launcher

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Ctrl-C reaches a process from the terminal and again from its launcher: that is one request.
SAME_REQUEST_S = 2.0
# A process that was interrupted, or has obeyed, may take so long to end by itself.
UNWIND_S, OBEYED_S = 3.0, 30.0
# When its launcher has died, a run may take so long to stop in order; a checkpoint that takes longer is left undone.
LAUNCHER_GONE, LAUNCHER_GONE_S = "the launcher is gone", 2.5
LAUNCHERS = (b"torchrun", b"accelerate", b"python")  # one of them is in the command line of every launcher
LAST_WORDS_S = 2.0  # status.json may be on a disk that hangs
TICK_S = 0.25
END_OF_PIPE = 0  # no signal has this number
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StopRequest:
    """Whether this process has been asked to stop, and how it does so.

    As long as it does not postpone, a signal raises `Stopped` in the main thread, wherever that is; where the thread
    is in C code and does not come back, the process is ended. Nothing is lost by that: every file is written whole.

    Attributes:
        reason: why, such as "received SIGTERM"; None before any request.
        outcome: what `Stopped` says beside the reason when a signal interrupts.
        postpones: whether the main thread looks at `reason` by itself, after every batch.
        obeyed: whether it has done all that is to be done before the end.
        last_words: called with a status and its reason before this process ends by force.
        checks: called several times a second by a thread; they must not wait for a disk.
        start_s: the time of its beginning, of `time.monotonic`.
        num_moves: counted up by the main thread after every batch, so that a watchdog sees that it is not stuck.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.outcome = "stopped before the end; the same command starts again"
        self.postpones, self.obeyed, self.interrupted = False, False, False
        self.last_words: Callable[[Literal["preempted", "failed"], str], None] = lambda *_: None
        self.checks: list[Callable[[], None]] = []
        self.start_s, self.num_moves = time.monotonic(), 0
        self._pid, self._launcher = os.getpid(), _launcher()
        self._received_s, self._limit_s, self._unwinding_s = math.inf, math.inf, math.inf
        self._is_answered = self._is_handled = False

    def note(self, reason: str, *, limit_s: float = math.inf) -> None:
        """Remember the request if it is the first; `limit_s` from now this process will be killed."""
        if self.reason is None:
            self._received_s, self._limit_s = time.monotonic(), limit_s
            self.reason = reason

    def seconds_left(self) -> float:
        """Time until this process is killed; infinite before any request, and where nobody threatens to."""
        return max(0.0, self._received_s + self._limit_s - time.monotonic())

    def postpone(self) -> None:
        """From now on the main thread looks at `reason` after every batch; until `end_postponement`."""
        self.postpones = True

    def end_postponement(self) -> None:
        """From now on a signal interrupts again.

        Raises:
            Stopped: one has come that nobody has obeyed.
        """
        self.postpones = False
        if self.reason is not None and not self.obeyed:
            self.interrupted = True
            raise Stopped(f"{self.reason}: {self.outcome}")

    def handle(self, number: int, _: FrameType | None) -> None:
        """The handler of all stop signals, in the main thread. Children that are forked ignore the signals."""
        if os.getpid() != self._pid:
            return
        # The thread notes it too, but the main thread must not train on before that one has had its turn.
        self.note_signal(number)
        is_first, self._is_handled = not self._is_handled, True
        if is_first and not self.postpones and not self.obeyed:
            self.interrupted = True
            raise Stopped(f"{self.reason}: {self.outcome}")

    def was_ignored(self, unraisable: object) -> bool:
        """Whether the `Stopped` of a signal ended where Python ignores errors: in `__del__`, in a weakref's callback.

        The thread interrupts again then.
        """
        if not isinstance(getattr(unraisable, "exc_value", None), Stopped):
            return False
        self._is_handled = self.interrupted = False
        return True

    def note_signal(self, number: int) -> None:
        """`note` a signal. The launcher kills its processes some time after all signals but SIGUSR1."""
        limit_s = math.inf
        if number != signal.SIGUSR1 and "TORCHELASTIC_RUN_ID" in os.environ:
            # The limit of torchrun, read where torchrun reads it.
            limit_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        self.note(f"received {signal.Signals(number).name}", limit_s=limit_s)

    def tick(self) -> None:
        """Answer on the screen, notice that the launcher is gone, and end a process that does not end by itself."""
        now_s = time.monotonic()
        if self.reason is None and self._launcher not in (None, os.getppid()):
            self.note(LAUNCHER_GONE)
            os.kill(self._pid, signal.SIGTERM)  # the handler interrupts the main thread
        if self.reason is not None and not self.obeyed:
            waits_s = now_s - self._received_s
            # Who is interrupted has its last line at once, unless it is somewhere in C code.
            if not self._is_answered and (self.postpones or waits_s > 1):
                self._is_answered = True
                how = "after the batch in progress (a second signal ends it at once)" if self.postpones else "now"
                _print(f"{self.reason}: stopping {how}" if os.environ.get("RANK", "0") == "0" else "")
            if not (self.postpones or self._is_handled) and TICK_S < waits_s < SAME_REQUEST_S:
                signal.raise_signal(signal.SIGTERM)
            if self.reason == LAUNCHER_GONE and waits_s > LAUNCHER_GONE_S:
                self.end(EXIT_STOPPED, "preempted", f"{self.reason}: ended at once")
        if self.reason is not None and not self.postpones:
            self._unwinding_s = min(self._unwinding_s, now_s)
            if now_s - self._unwinding_s > (OBEYED_S if self.obeyed else UNWIND_S):
                self.end(EXIT_STOPPED, "preempted", f"{self.reason}: {self.outcome}")
        for check in self.checks:
            check()

    def end(self, code: int, status: Literal["preempted", "failed"], reason: str) -> None:
        """End this process by force. Called by a thread, as the main one may hang."""
        if not self.obeyed:
            _print(reason)
            words = threading.Thread(target=self.last_words, args=(status, reason), daemon=True)
            words.start()
            words.join(LAST_WORDS_S)
            leave_for_launcher(f"relora: {reason}")
        os._exit(code)


@contextmanager
def stop_signals(*, restores: bool = True) -> Iterator[StopRequest]:
    """While this is open, signals to stop go to the request that it yields; then the old handlers come back.

    A second signal, 2 seconds or more after the first, ends the process with EXIT_STOPPED whatever it does. SIGHUP is
    left alone where it is ignored (nohup). Children that are forked meanwhile ignore these signals, but for SIGTERM
    where nothing is postponed, and die with their parent. Of nested uses the inner one receives. Outside the main
    thread, where Python allows no handlers, nothing is ever noted.

    Args:
        restores: False for a program that ends afterwards: it ignores the signals then.

    Raises:
        Stopped: a signal has interrupted the block, whatever the block has made of it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _handlers(request, restores=restores), _listening_thread(request):
        try:
            yield request
        except Exception:
            if request.interrupted:  # libraries turn it into errors of their own
                raise Stopped(f"{request.reason}: {request.outcome}") from None
            raise


@contextmanager
def _handlers(request: StopRequest, *, restores: bool) -> Iterator[None]:
    """Python handlers for the request, until the end of the block."""
    handled = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, request.handle) for number in handled}
    for number in handled:
        # System calls of C code (NCCL, file systems) are resumed after the handler, not interrupted.
        signal.siginterrupt(number, False)
    hook = sys.unraisablehook

    def unraisable(about: Any) -> None:
        if not request.was_ignored(about):
            hook(about)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, before in previous.items():
            # None: it was installed by C code, which Python can neither name nor bring back.
            signal.signal(number, (signal.SIG_DFL if before is None else before) if restores else signal.SIG_IGN)


@contextmanager
def _listening_thread(request: StopRequest) -> Iterator[None]:
    """The pipe of signal numbers, and the thread that reads it, until the end of the block."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as set_wakeup_fd demands: a signal handler must not block
    requests = _open_requests()
    requests[write_end] = request
    thread = threading.Thread(target=_listen, args=(read_end, request), name="stop signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        if write_end in requests:  # else this is a forked child that left the block: the thread is its parent's
            # Closing the pipe would not end the thread: forked children may hold it open.
            os.write(write_end, bytes([END_OF_PIPE]))
            thread.join()
            del requests[write_end]
        os.close(read_end)
        os.close(write_end)


def _listen(read_end: int, request: StopRequest) -> None:
    """Note the first signal, end the process at the second."""
    first_s = math.inf  # not the request's: the handler may have noted the signal long before this thread had its turn
    while True:
        [ready, *_] = select.select([read_end], [], [], TICK_S)
        for number in os.read(read_end, 64) if ready else b"":
            if number == END_OF_PIPE:
                return
            # Others arrive here as well, such as the SIGCHLD of a DataLoader's workers.
            if number not in STOP_SIGNALS:
                continue
            if time.monotonic() - first_s >= SAME_REQUEST_S:
                name = signal.Signals(number).name
                request.end(EXIT_STOPPED, "preempted", f"received a second signal ({name}): exiting immediately")
            request.note_signal(number)
            first_s = min(first_s, time.monotonic())
        if request in list(_open_requests().values())[-1:]:  # of nested ones the inner
            request.tick()


@cache  # once a process: a function that is registered for forks stays registered
def _open_requests() -> dict[int, StopRequest]:
    """The requests in use here by the write end of their pipe, the innermost last.

    A forked child forgets them, as its signals are no business of its parent, and is killed when that ends: workers of
    a DataLoader would live on for seconds, those of `Dataset.map` for ever.
    """
    requests: dict[int, StopRequest] = {}
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = [os.getpid()]

    def forget() -> None:
        descriptor = signal.set_wakeup_fd(-1)
        if descriptor != -1 and descriptor not in requests:  # of another library, such as asyncio
            signal.set_wakeup_fd(descriptor)
        if requests and libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent[0]:
                os._exit(EXIT_STOPPED)
        if requests and not list(requests.values())[-1].postpones:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that a pool can end its workers
        requests.clear()
        parent[0] = os.getpid()

    os.register_at_fork(after_in_child=forget)
    return requests


def _launcher() -> int | None:
    """The pid of the launcher that has started this process, 0 if that is gone already; None without one: a shell may
    go and leave its run.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        command = b""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return parent if b"accelerate" in command else None
    # Orphans belong to process 1, which in a container may be the launcher itself.
    is_orphan = parent == 1 and not any(name in command for name in LAUNCHERS)
    return 0 if is_orphan else parent


def _print(line: str) -> None:
    """Print a line on stderr, unless it is empty; not by sys.stderr, whose lock a hanging main thread may hold."""
    if line:
        with suppress(OSError):
            os.write(2, f"{chr(10) if os.isatty(2) else ''}relora: {line}\n".encode())
