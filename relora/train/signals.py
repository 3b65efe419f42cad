"""Orderly ends: the first signal to stop is noted, a second one ends the process at once.

Python's handlers cannot do the second: they run in the main thread between two of its instructions, and that thread may
sit in a collective for hours. So a thread of its own reads the numbers of the signals from a pipe, into which the
interpreter writes them the moment they come, in whichever thread that is (`signal.set_wakeup_fd`).
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
# Ctrl-C reaches the ranks from the terminal and again from their launcher: that is one request.
SAME_REQUEST_S = 2.0
END = 0  # no signal has this number


class StopRequest:
    """What this process has been asked to do.

    Attributes:
        signal: the first of SIGTERM, SIGINT and SIGUSR1 that came; None before any.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._at_s = math.inf

    def note(self, number: int) -> None:
        """Remember the signal if it is the first."""
        if self.signal is None:
            self._at_s = time.monotonic()
            self.signal = signal.Signals(number)

    def seconds_left(self) -> float:
        """Until the launcher kills this process: infinite before any signal, and after SIGUSR1, which is no threat."""
        if self.signal in (None, signal.SIGUSR1):
            return math.inf
        # The limit of torchrun, read where torchrun reads it.
        limit_s = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
        return max(0.0, self._at_s + limit_s - time.monotonic())


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """While this is open, signals to stop are noted in what it yields; the handlers before it come back afterwards.

    A second signal, 2 seconds or more after the first, ends the process with EXIT_STOPPED whatever it does. Children
    that are forked meanwhile ignore these signals, and tell nothing. Nested uses: the inner one hears. Outside the main
    thread, where Python lets nobody install handlers, nothing is ever noted.
    """
    asked = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    with _numbers_go_to(asked), _handlers_of(asked):
        yield asked


@contextmanager
def _handlers_of(asked: StopRequest) -> Iterator[None]:
    def handler(number: int, _: FrameType | None) -> None:
        # The thread notes it too, but the main thread shall not train on before that one has had its turn.
        asked.note(number)

    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        # Nobody waits for the handler: C code (NCCL, file systems) need not be torn out of its system calls for it.
        signal.siginterrupt(number, False)
    try:
        yield
    finally:
        for number, handled in previous.items():
            # None: it was installed by C code, which Python can neither name nor bring back.
            signal.signal(number, signal.SIG_DFL if handled is None else handled)


@contextmanager
def _numbers_go_to(asked: StopRequest) -> Iterator[None]:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as set_wakeup_fd demands: a signal handler must not block
    ours = _pipes_of_this_process()
    ours.add(write_end)
    thread = threading.Thread(target=_listen, args=(read_end, asked), name="stop signals", daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        if write_end in ours:  # else this is a child that has run on to here, and the thread its parent's
            # Closing the pipe would not end the thread: forked children may hold it open.
            os.write(write_end, bytes([END]))
            thread.join()
            ours.remove(write_end)
        os.close(read_end)
        os.close(write_end)


def _listen(read_end: int, asked: StopRequest) -> None:
    """Note the first signal, end the process at the second."""
    first_s = math.inf  # not asked's: the handler may have noted the same signal long before this thread had its turn
    while (number := os.read(read_end, 1)[0]) != END:
        # Others come here as well, for one the SIGCHLD of a DataLoader's workers.
        if number in STOP_SIGNALS:
            if time.monotonic() - first_s >= SAME_REQUEST_S:
                _end_at_once(number)
            asked.note(number)
            first_s = min(first_s, time.monotonic())


def _end_at_once(number: int) -> None:
    with suppress(OSError):
        os.write(2, f"relora: {signal.Signals(number).name} came, the second signal: ended at once\n".encode())
    os._exit(EXIT_STOPPED)


@cache  # once a process: what is registered for a fork stays for ever
def _pipes_of_this_process() -> set[int]:
    """The write ends in use here. A forked child forgets them: what it hears is nothing to its parent."""
    pipes: set[int] = set()

    def forget() -> None:
        descriptor = signal.set_wakeup_fd(-1)
        if descriptor != -1 and descriptor not in pipes:  # somebody else's, asyncio's for one
            signal.set_wakeup_fd(descriptor)
        pipes.clear()

    os.register_at_fork(after_in_child=forget)
    return pipes
