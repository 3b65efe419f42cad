"""The reserved source `python-stdlib`: the sources of the running Python, the offline default."""

import sysconfig
import tokenize
from functools import cache
from pathlib import Path

STDLIB = "python-stdlib"
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def stdlib_files() -> tuple[Path, ...]:
    """Every non-empty *.py of the standard library but its tests and what was installed, sorted."""
    folder = stdlib_folder()
    return tuple(
        path
        for path in sorted(folder.rglob("*.py"))
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts) and path.stat().st_size
    )


def stdlib_texts() -> list[str]:
    """The text of each file, read in the encoding that it declares (PEP 263)."""
    texts = []
    for path in stdlib_files():
        with tokenize.open(path) as file:
            texts.append(file.read())
    return texts
