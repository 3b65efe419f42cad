"""How a command ends: a mistake of the user, a failure, a request to stop, and their exit codes."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from relora.text import without_secrets

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 143  # 128 + SIGTERM: the status a shell reports for a process that SIGTERM ended


class UserError(Exception):
    """Mistakes of the user, all those of one phase together, one line each. The command ends with exit code 2."""

    def __init__(self, problems: Iterable[str]) -> None:
        lines = (" ".join(part.strip() for part in problem.splitlines()) for problem in problems)
        self.problems = [without_secrets(line) for line in lines]  # they go to logs, and to status.json
        super().__init__("\n".join(self.problems))


class Failed(RuntimeError):  # noqa: N818  # as the others here
    """Something outside of the program prevents it from going on, or the run has gone wrong: one line, exit code 1."""

    def __init__(self, reason: str) -> None:
        super().__init__(without_secrets(reason))


class Stopped(BaseException):  # not an error
    """The command was asked to stop and ends in order, with exit code 143.

    As KeyboardInterrupt it may be raised anywhere, so it is no `Exception`, which libraries catch.
    """


def warn(text: str) -> None:
    """Print a warning, which goes to stderr with the errors, since nothing that the command writes depends on it."""
    print(f"relora: warning: {text}", file=sys.stderr, flush=True)


def leave_for_launcher(message: str) -> None:
    """Leave the reason of a failure to torchrun, which shows that of the process that failed first at the very end.

    Its exit code is 1, whatever that of the processes is. The first message of a process stays.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None and not Path(path).exists():
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `UserError` with all problems, unless there are none."""
    found = list(problems)
    if found:
        raise UserError(found)


DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a disk or its permissions answer: a fact about the machine, of which a traceback tells nothing.
DISK_ERRORS = (
    *(*DISK_IS_FULL, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ENODEV),
)


@contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Within this, a disk's OSError that names no file names `path`: those of writing and flushing name none.

    What a library, or a process that it has started, makes of a full disk becomes such an OSError again.
    """
    try:
        yield
    except (UserError, Failed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is None and error.errno in DISK_ERRORS:
                error.filename = str(path)
            raise
        number = _full_disk_behind(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _full_disk_behind(error: BaseException) -> int | None:
    """The errno of a full disk, if one is behind `error`: as an OSError, or in the words of Rust or another process."""
    cause: BaseException | None = error
    while cause is not None:
        numbers = [cause.errno] if isinstance(cause, OSError) else []
        # tokenizers: "No space left on device (os error 28)"; multiprocessing: the text of a traceback
        numbers += [int(text) for text in re.findall(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(cause))]
        for number in numbers:
            if number in DISK_IS_FULL:
                return number
        cause = cause.__cause__ or cause.__context__
    return None


def disk_failure(error: OSError) -> str | None:
    """One line on a full, failing or forbidden disk; None for another error, of which the traceback is wanted."""
    if error.errno not in DISK_ERRORS:
        return None
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{place}{error.strerror or os.strerror(error.errno)}; the same command goes on when this is mended"
