"""Requests to stop: the first signal is noted, a second one ends the process at once.

A Python signal handler cannot do the second: it runs in the main thread, between two bytecode instructions, and that
thread may be blocked in a collective for hours. So the interpreter writes the number of each signal to a pipe the
moment it arrives, in whichever thread that is (`signal.set_wakeup_fd`), and a thread of our own reads them.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import FrameType

from relora.errors import EXIT_STOPPED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches a process from the terminal and again from its launcher: that is one request.
SAME_REQUEST_S = 2.0
END_OF_PIPE = 0  # no signal has this number


class StopRequest:
    """Whether this process has been asked to stop.

    Attributes:
        signal: the first of SIGTERM, SIGINT and SIGUSR1 that was received; None before any.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_s = math.inf

    def note(self, number: int) -> None:
        """Remember the signal if it is the first."""
        if self.signal is None:
            self._received_s = time.monotonic()
            self.signal = signal.Signals(number)

    def seconds_left(self) -> float:
        """Time until the launcher kills this process; infinite before any signal, and after SIGUSR1, no threat."""
        if self.signal in (None, signal.SIGUSR1):
            return math.inf
        # The limit of torchrun, read where torchrun reads it.
        limit_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        return max(0.0, self._received_s + limit_s - time.monotonic())


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """While this is open, signals to stop are noted in the request that it yields; then the old handlers come back.

    A second signal, 2 seconds or more after the first, ends the process with EXIT_STOPPED whatever it does. Children
    that are forked meanwhile ignore these signals, and their parent does not see them. Of nested uses the inner one
    receives. Outside the main thread, where Python allows no handlers, nothing is ever noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with _listening_thread(request), _handlers(request):
        yield request


@contextmanager
def _handlers(request: StopRequest) -> Iterator[None]:
    """Python handlers that note the signal, until the end of the block."""

    def handler(number: int, _: FrameType | None) -> None:
        # The thread notes it too, but the main thread must not train on before that one has had its turn.
        request.note(number)

    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        # System calls of C code (NCCL, file systems) are resumed after the handler, not interrupted.
        signal.siginterrupt(number, False)
    try:
        yield
    finally:
        for number, handled in previous.items():
            # None: it was installed by C code, which Python can neither name nor bring back.
            signal.signal(number, signal.SIG_DFL if handled is None else handled)


@contextmanager
def _listening_thread(request: StopRequest) -> Iterator[None]:
    """The pipe of signal numbers, and the thread that reads it, until the end of the block."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as set_wakeup_fd demands: a signal handler must not block
    own_pipes = _pipes_of_this_process()
    own_pipes.add(write_end)
    thread = threading.Thread(target=_listen, args=(read_end, request), name="stop signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        if write_end in own_pipes:  # else this is a forked child that left the block: the thread is its parent's
            # Closing the pipe would not end the thread: forked children may hold it open.
            os.write(write_end, bytes([END_OF_PIPE]))
            thread.join()
            own_pipes.remove(write_end)
        os.close(read_end)
        os.close(write_end)


def _listen(read_end: int, request: StopRequest) -> None:
    """Note the first signal, end the process at the second."""
    first_s = math.inf  # not the request's: the handler may have noted the signal long before this thread had its turn
    while (number := os.read(read_end, 1)[0]) != END_OF_PIPE:
        # Others arrive here as well, such as the SIGCHLD of a DataLoader's workers.
        if number not in STOP_SIGNALS:
            continue
        if time.monotonic() - first_s >= SAME_REQUEST_S:
            name = signal.Signals(number).name
            with suppress(OSError):
                os.write(2, f"relora: received a second signal ({name}): exiting immediately\n".encode())
            os._exit(EXIT_STOPPED)
        request.note(number)
        first_s = min(first_s, time.monotonic())


@cache  # once a process: a function that is registered for forks stays registered
def _pipes_of_this_process() -> set[int]:
    """The write ends in use here. A forked child forgets them: its signals are no business of its parent."""
    pipes: set[int] = set()

    def forget() -> None:
        descriptor = signal.set_wakeup_fd(-1)
        if descriptor != -1 and descriptor not in pipes:  # of another library, such as asyncio
            signal.set_wakeup_fd(descriptor)
        pipes.clear()

    os.register_at_fork(after_in_child=forget)
    return pipes
