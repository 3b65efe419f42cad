"""What a user got wrong, one line a problem."""

from collections.abc import Iterable


class UserError(Exception):
    """Mistakes of the user, all those of one phase together. The command ends with exit code 2."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one `UserError` that holds every problem, if there is one."""
    found = list(problems)
    if found:
        raise UserError(found)
