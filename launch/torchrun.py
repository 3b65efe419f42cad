"""torchrun with a short summary, which names the process that failed first, and an exit code that says why.

    python launch/torchrun.py [options of torchrun] -m relora train CONFIG

torch's own torchrun ends with 1 whatever its processes end with, after a traceback of itself. This one ends with the
code of the process that failed first (docs/run_folder.md lists them), so that a scheduler can tell a mistake (2), which
no retry mends, from a run that was asked to stop (143).
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

STOPPED = 143  # as relora.errors.EXIT_STOPPED, which would take relora's packages to import
# The beginning of what a process leaves that has ended because of another one.
BECAUSE_OF_ANOTHER = "relora: process "


def main() -> int:
    """Run torchrun on the command line's options; its exit code."""
    try:
        run(parse_args(None))
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: order(item[1]))
        print(summary(failures), file=sys.stderr, flush=True)
        code = failures[0][1].exitcode
        return code if code > 0 else 128 - code  # torch says -9 of a process that SIGKILL ended, a shell 137
    except SignalException as error:
        print(f"torchrun: received {error.sigval.name}; its processes have ended", file=sys.stderr, flush=True)
        return STOPPED
    return 0


def order(failure: ProcessFailure) -> tuple[bool, int]:
    """Causes before what follows from them, then by time, which torch knows to the second only."""
    return text(failure).startswith(BECAUSE_OF_ANOTHER), failure.timestamp


def text(failure: ProcessFailure) -> str:
    """What a process left to say about its end, or what torch makes of its exit code."""
    message = failure.message
    if failure.exitcode < 0:
        return f"ended by {failure.signal_name()}"
    if failure.error_file == "<N/A>":
        return "it left no message; see its output above"
    return str(message).strip()


def summary(failures: list[tuple[int, ProcessFailure]]) -> str:
    """The first failure in full, one line for each other one."""
    [(rank, first), *others] = failures
    lines = [f"torchrun: process {rank} failed first ({place(first)}):", text(first)]
    lines += [f"torchrun: process {rank} ({place(failure)}): {last_line(failure)}" for rank, failure in others]
    return "\n".join(lines)


def place(failure: ProcessFailure) -> str:
    return f"local rank {failure.local_rank}, pid {failure.pid}, exit code {failure.exitcode}"


def last_line(failure: ProcessFailure) -> str:
    return text(failure).splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
