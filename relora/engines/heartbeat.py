"""Heartbeats: when a process dies or is frozen, the others exit within about a minute, naming it and the reason.

While processes start up it may take ten minutes. A hung main thread is not noticed: heartbeats come from another one.

Nothing else does: the time limit of the process group is hours, as the first process writes checkpoints alone, and NCCL
waits that long for a lost peer; a launcher sees the processes of its own node only.
"""

import faulthandler
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from relora.engines.flight_record import write_flight_record
from relora.errors import leave_for_launcher

# The beginning of the reason of a process whose watchdog has ended it: the others print their stacks too.
NOTHING_MOVED = "nothing has moved for"


@dataclass(frozen=True)
class Limits:
    every_s: float = 2.0  # between two heartbeats
    silent_s: float = 45.0  # a process, or the store, may be silent for so long
    start_s: float = 600.0  # the same before its first heartbeat: it may still be loading
    grace_s: float = 10.0  # this process may take so long to end by itself when another one is dead


def agree_on_name() -> str:
    """A new name for this launch, the same on all its processes. Collective."""
    # A store can outlive a launch, and a later launch must not read the earlier one's verdict.
    # TORCHELASTIC_RESTART_COUNT does not tell them apart: each launcher counts for itself, and one that replaces a
    # lost node begins at 0.
    names = [uuid.uuid4().hex]
    distributed.broadcast_object_list(names)
    return names[0]


class Heartbeat:
    """Shows the other processes that this one lives, and watches one of them.

    A few small messages each, however many processes there are. They come from a thread: a long computation does not
    stop them, SIGKILL and SIGSTOP do. The store is the one at MASTER_ADDR:MASTER_PORT, of the launcher or of the first
    process; when it stops answering, its holder counts as dead.

    Attributes:
        last_words: called with the reason before this process is ended because of another one.

    Args:
        name: the result of `agree_on_name`.
    """

    last_words: Callable[[str], None]

    def __init__(self, process_index: int, num_processes: int, name: str, limits: Limits = Limits()) -> None:
        self._process_index, self._neighbour, self._name, self._limits = (
            process_index,
            (process_index - 1) % num_processes,
            name,
            limits,
        )
        self._host, self._port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._me = f"process {process_index} (host {socket.gethostname()}, pid {os.getpid()})"
        self.last_words = lambda *_: None
        self._failure = ""  # of this process
        self._verdict = ""  # the first failure of all, when it is known here
        self._rounds = 0  # how often the store has answered
        self._beats = StallTimer(3 * limits.every_s)  # of the watched neighbour
        self._ending = False
        self._stopped, self._wake, self._judged = (threading.Event() for _ in range(3))
        self._lock = threading.Lock()  # held to print, to end the process, and in stop()
        # Torch's client has no time limit for an answer: the first thread may hang in it, the second sees that.
        targets = self._beat, self._watch_store
        self._threads = [threading.Thread(target=target, name="watch", daemon=True) for target in targets]

    def start(self) -> None:
        """Begin. Processes may start far apart."""
        for thread in self._threads:
            thread.start()

    def report_failure(self, reason: str) -> str:
        """Tell the others that this process ends because of an error; it has grace_s to do so, or to call stop().

        Returns:
            The failure of another process that came first, from which this one may follow; empty if none is known.
        """
        text = " ".join(reason.split())[:600].encode(errors="backslashreplace").decode()
        self._failure = f"{self._me} failed: {text}"
        self._wake.set()
        if self._threads[0].is_alive():
            self._judged.wait(2 * self._limits.every_s)
        return "" if self._verdict == self._failure else self._verdict

    def stop(self) -> None:
        """Shut down cleanly: the others stop expecting heartbeats, and this process exits because of them no more."""
        with self._lock:
            self._stopped.set()
        self._wake.set()
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(timeout=2 * self._limits.every_s)  # not longer: it may hang in the store

    def _beat(self) -> None:
        store, verdict, last = None, b"", False
        while not last:
            self._wake.clear()
            last = self._stopped.is_set()
            try:
                store = store or self._connect()
                verdict = self._round(store, last=last)
                self._rounds += 1
            except (OSError, RuntimeError):  # the latter are torch's
                store = None  # the other thread limits how long this may last
            if verdict:
                self._end(verdict.decode())
            self._wake.wait(0 if last else self._limits.every_s)

    def _connect(self) -> Store:
        # A plain connection first: TCPStore prints pages of C++ frames whenever it finds nobody.
        with socket.create_connection((self._host, self._port), timeout=self._limits.silent_s):
            limit = timedelta(seconds=self._limits.silent_s)
        client = TCPStore(self._host, self._port, is_master=False, wait_for_workers=False, timeout=limit)
        store = PrefixStore(f"relora/watch/{self._name}", client)
        store.set(f"who/{self._process_index}", self._me)
        return store

    def _round(self, store: Store, *, last: bool) -> bytes:
        """One round of messages. Returns the verdict, if any: the first, as later ones mostly follow from it."""
        store.add(f"beat/{self._process_index}", 1)
        if self._failure:
            return bytes(store.compare_set("verdict", "", self._failure))
        if last:
            store.set(f"left/{self._process_index}", "in order")
            return b""
        beats = store.add(f"beat/{self._neighbour}", 0)  # 0 before the first one, where `get` would wait
        limit_s = self._limits.silent_s if beats else self._limits.start_s
        if self._beats.still_s(beats) > limit_s and not store.check([f"left/{self._neighbour}"]):
            who = store.get(f"who/{self._neighbour}").decode() if beats else f"process {self._neighbour}"
            store.compare_set("verdict", "", f"{who} has been silent for {limit_s:.0f} s")
        return bytes(store.get("verdict") if store.check(["verdict"]) else b"")

    def _watch_store(self) -> None:
        silent_s, rounds = self._limits.silent_s, StallTimer(3 * self._limits.every_s)
        while not self._stopped.wait(self._limits.every_s):
            if rounds.still_s(self._rounds) > silent_s:
                holder = "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "process 0"
                where = f"at {self._host}:{self._port}"
                self._end(f"{holder} is gone or unreachable: its store {where} has not answered for {silent_s:.0f} s")

    def _end(self, why: str) -> None:
        """Print the reason, and end this process unless it does so by itself in time."""
        self._verdict = self._verdict or why
        self._judged.set()
        with self._lock:
            if self._stopped.is_set() or self._ending:
                return
            self._ending = True
            if why != self._failure:  # else the main thread prints more about it
                with suppress(OSError):  # not sys.stderr, whose lock a hanging main thread may hold
                    os.write(2, f"relora: process {self._process_index} ended: {why}\n".encode())
                    if NOTHING_MOVED in why:
                        faulthandler.dump_traceback(file=2)
                        write_flight_record()
        self._stopped.wait(self._limits.grace_s)
        with self._lock:
            if not self._stopped.is_set():
                words = threading.Thread(target=self.last_words, args=(why,), daemon=True)
                words.start()
                words.join(self._limits.every_s)  # not longer: the disk may hang
                leave_for_launcher(f"relora: process {self._process_index} ended: {why}")
                os._exit(1)


class StallTimer:
    """Measures how long a number has not changed. A gap between two calls counts for at most `most_s`.

    So the time during which this process was suspended (by Slurm, by Ctrl-Z) does not make the others look silent.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s, self._number, self._looked_s, self._still_s = most_s, -1, 0.0, 0.0

    def still_s(self, number: int) -> float:
        now_s = time.monotonic()
        self._still_s += min(now_s - self._looked_s, self._most_s)
        if number != self._number:
            self._still_s = 0.0
        self._number, self._looked_s = number, now_s
        return self._still_s
