"""How a command ends: what a user got wrong, one line a problem; a request to stop; the exit codes of both."""

from collections.abc import Iterable
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_STOPPED = 143  # 128 + SIGTERM: what a shell reports of a process that SIGTERM has ended


class Stopped(RuntimeError):  # noqa: N818  it is no error
    """The run was asked to stop and has ended in order."""


class UserError(Exception):
    """Mistakes of the user, all those of one phase together, a line each. The command ends with exit code 2."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [" ".join(part.strip() for part in problem.splitlines()) for problem in problems]
        super().__init__("\n".join(self.problems))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `UserError` that holds every problem, if there is one."""
    found = list(problems)
    if found:
        raise UserError(found)


def folder_problems(said: str, path: str) -> list[str]:
    """Why no folder can be made at `path`, which the user gave as `said`: a file is in the way."""
    nearest = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if nearest.is_dir():
        return []
    return [f"{said}: is a file" if nearest == Path(path) else f"{said}: {nearest} is a file, not a folder"]
