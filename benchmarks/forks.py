"""Programs as forks of this process, which has loaded all libraries already: a command costs no seconds of imports."""

import math
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser

from relora.cli import main
from relora.errors import EXIT_STOPPED, Stopped
from relora.train.signals import stop_signals

PATIENCE_S = 120.0
EXIT_TRACEBACK = 70


class Forked:
    """A forked process in a session of its own, its output in a file; gone, with its children, after a block."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.code: int | None = None

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.code is None:
            os.waitpid(self.pid, 0)
        self.log.unlink()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def has_ended(self) -> bool:
        if self.code is None:
            pid, state = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(state) if pid else None
        return self.code is not None

    def wait_until(self, reached: Callable[[], bool]) -> float:
        """Seconds until `reached`. The process must live until then."""
        start_s = time.monotonic()
        while not reached():
            assert not self.has_ended(), f"ended with {self.code}:\n{self.log.read_text()[-3000:]}"
            assert time.monotonic() - start_s < PATIENCE_S, self.log.read_text()[-3000:]
            time.sleep(0.002)
        return time.monotonic() - start_s

    def end(self, *, patience_s: float = PATIENCE_S) -> tuple[int, str]:
        """Exit code and output of the process, when it has ended."""
        start_s = time.monotonic()
        while not self.has_ended():
            assert time.monotonic() - start_s < patience_s, self.log.read_text()[-3000:]
            time.sleep(0.002)
        assert self.code is not None
        return self.code, self.log.read_text()

    def orphans(self) -> list[int]:
        """Processes of its session that are left, zombies aside."""
        left = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    left.append(int(path.parent.name))
        return left


def forked(program: Callable[[], object]) -> Forked:
    """Start `program` in a fork. It ends with what `program` returns if that is a number, else with 0; with 143 when it
    was stopped, and with 70 and a traceback after any other error.
    """
    descriptor, log = tempfile.mkstemp(prefix="forked-")
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return Forked(pid, Path(log))
    code = EXIT_TRACEBACK
    try:
        begin_session(descriptor, descriptor)
        result = program()
        code = result if isinstance(result, int) else 0
    except Stopped as stopped:
        os.write(2, f"relora: {stopped}\n".encode())
        code = EXIT_STOPPED
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def run_to_end(program: Callable[[], object], what: str) -> None:
    """Run `program` in a fork, however long it takes; SystemExit with `what` and the end of its output if it failed."""
    with forked(program) as process:
        code, said = process.end(patience_s=math.inf)
    if code:
        raise SystemExit(f"{what}: {said[-3000:]}")


def begin_session(stdout: int, stderr: int) -> None:
    """Let this forked process lead a session, and print to these descriptors line by line."""
    os.setsid()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    # The objects of the process that it was forked from may be others, such as a test's.
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)


def accelerate_launch(*words: str) -> None:
    """`accelerate launch WORDS` by this process, whose torchrun forks the ranks from it.

    They stay in its session, whereas those of the command have sessions of their own. The program is a path, not `-m`.
    """
    options = launch_command_parser().parse_args(words)
    options.run_path, options.start_method = True, "fork"  # of torchrun, to which accelerate hands them on
    launch_command(options)


def command(*arguments: str) -> Forked:
    """Start `relora ARGUMENTS` in a fork, and return when it would answer a signal."""
    ready, told = os.pipe()

    def program() -> int:
        code = EXIT_STOPPED
        # As `relora.cli.program` does, before anything is loaded.
        with suppress(Stopped), stop_signals(restores=False):
            os.write(told, b".")
            code = main(arguments)
        return code

    process = forked(program)
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return process
