"""Real signals to small programs: the first is noted, a second one ends the process, whatever it does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from relora.errors import EXIT_STOPPED
from relora.train.signals import SAME_REQUEST_S, STOP_SIGNALS, stop_signals
from tests.helpers.programs import ROOT

# The module by itself: with its package the programs would load torch.
HEAD = """
import ctypes, os, signal, subprocess, sys, time
sys.path.insert(0, "relora/train")
from signals import stop_signals

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under nohup it is ignored, and stays so

def stuck_in_python():
    while True:
        time.sleep(60)

def stuck_in_c():
    # A mutex taken twice, as in a collective: nothing of Python runs in this thread again.
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)

def say(*words):
    print(*words, flush=True)

"""
UNTIL_ASKED = """
with stop_signals() as asked:
    asked.postpone()
    say("ready", asked.reason, asked.seconds_left())
    while asked.reason is None:
        time.sleep(0.01)
    time.sleep(0.5)
    say(asked.reason.removeprefix("received "), asked.seconds_left())
"""


@contextmanager
def program(text: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has said that it is ready; gone, with its children, at the end of the block."""
    command, pipe = [sys.executable, "-c", HEAD + text], subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, start_new_session=True, env=os.environ | environment
    ) as process:
        try:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def rest(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit code, the words of what it printed, and what it complained of."""
    code = process.wait(timeout=20)
    # Not by communicate(), which passes by what was read ahead with the first line.
    assert process.stdout is not None
    assert process.stderr is not None
    return code, process.stdout.read().split(), process.stderr.read()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_not_deadly(number: signal.Signals) -> None:
    with program(UNTIL_ASKED) as process:
        process.send_signal(number)
        code, (name, seconds_left), _ = rest(process)
    assert (code, name) == (0, number.name)
    assert float(seconds_left) == float("inf"), "without a launcher nobody kills the process"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_the_limit_is_that_of_the_launcher(number: signal.Signals) -> None:
    launcher = {"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}
    with program(UNTIL_ASKED, **launcher) as process:
        process.send_signal(number)
        seconds_left = float(rest(process)[1][1])
    assert 230 < seconds_left <= 239.5 if number == signal.SIGINT else seconds_left == float("inf")


@pytest.mark.parametrize("stuck", ["stuck_in_python()", "stuck_in_c()"])
def test_a_second_signal_ends_the_process_wherever_it_is(stuck: str) -> None:
    with program(f"with stop_signals() as asked:\n    asked.postpone()\n    say('ready')\n    {stuck}") as process:
        process.send_signal(signal.SIGUSR1)
        time.sleep(SAME_REQUEST_S + 0.5)
        assert process.poll() is None, "the first was deadly"
        process.terminate()
        code, _, complained = rest(process)
    assert code == EXIT_STOPPED == 143
    answer = "relora: received SIGUSR1: stopping after the batch in progress (a second signal ends it at once)\n"
    assert complained == f"{answer}relora: received a second signal (SIGTERM): exiting immediately\n"


def test_two_signals_in_quick_succession_are_one_request() -> None:
    with program(UNTIL_ASKED) as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.terminate()
        code, (name, _), complained = rest(process)
    assert (code, name, complained.count("relora: received")) == (0, "SIGINT", 1)


def test_forked_children_live_on_and_tell_their_parent_nothing() -> None:
    children = """
with stop_signals() as asked:
    asked.postpone()
    say("ready")
    if not (child := os.fork()):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) * 2:
            os.kill(os.getpid(), number)
            time.sleep(0.5)
        os._exit(7)
    say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), asked.reason)
    os.kill(os.getpid(), signal.SIGTERM)
    say(asked.reason)
"""
    with program(children) as process:
        assert rest(process)[:2] == (0, ["7", "None", "received", "SIGTERM"])


def test_children_that_leave_the_block_do_not_stop_their_parents_thread() -> None:
    leaves = """
with stop_signals() as asked:
    asked.postpone()
    say("ready")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        stuck_in_c()
"""
    with program(leaves) as process:
        process.terminate()
        time.sleep(SAME_REQUEST_S + 0.5)
        process.terminate()
        assert rest(process)[0] == EXIT_STOPPED


def test_other_programs_and_other_signals_are_left_alone() -> None:
    others = """
came = []
signal.signal(signal.SIGCHLD, lambda *_: came.append("child"))  # as of a DataLoader; its number is in the pipe as well
with stop_signals() as asked:
    say("ready")
    say(subprocess.run(["sh", "-c", "kill -TERM $$"]).returncode)
    time.sleep(0.2)
    say(*came, asked.reason)
"""
    with program(others) as process:
        assert rest(process)[:2] == (0, ["-15", "child", "None"])


def state() -> list[object]:
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return [descriptor, len(list(Path("/proc/self/fd").iterdir())), *map(signal.getsignal, STOP_SIGNALS)]


def test_everything_is_as_before_after_any_use() -> None:
    before, threads = state(), threading.enumerate()
    for _ in range(2):
        with pytest.raises(ValueError, match="from inside"), stop_signals() as outer:
            outer.postpone()
            with stop_signals() as inner:
                inner.postpone()
                signal.raise_signal(signal.SIGUSR1)
                assert (inner.reason, outer.reason) == ("received SIGUSR1", None)
            signal.raise_signal(signal.SIGINT)
            assert (inner.reason, outer.reason) == ("received SIGUSR1", "received SIGINT")
            raise ValueError("from inside")
        assert state() == before
        assert threading.enumerate() == threads


def test_in_another_thread_nothing_happens() -> None:
    before: list[object] = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen: list[object] = []

    def use() -> None:
        with stop_signals() as asked:
            seen.extend([asked.reason, asked.seconds_left(), *map(signal.getsignal, STOP_SIGNALS)])

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None, float("inf"), *before]
