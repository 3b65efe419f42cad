"""How a command ends: a mistake of the user, a request to stop, and their exit codes."""

from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_STOPPED = 143  # 128 + SIGTERM: the status a shell reports for a process that SIGTERM ended


class UserError(Exception):
    """Mistakes of the user, all those of one phase together, one line each. The command ends with exit code 2."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [" ".join(part.strip() for part in problem.splitlines()) for problem in problems]
        super().__init__("\n".join(self.problems))


class Stopped(RuntimeError):  # noqa: N818  # not an error
    """The run was asked to stop and has ended in order. The command ends with exit code 143."""


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `UserError` with all problems, unless there are none."""
    found = list(problems)
    if found:
        raise UserError(found)
