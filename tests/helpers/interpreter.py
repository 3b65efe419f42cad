"""Triton's kernels run by its interpreter, in this process, with nothing left behind for the tests that follow."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

import relora.method

NAME = "triton_kernels"


@contextmanager
def fresh_kernels(*, interpreted: bool) -> Iterator[ModuleType]:
    """relora.method.triton_kernels as it is imported with, or without, TRITON_INTERPRET=1."""
    importlib.import_module("triton")  # before the variable is set: its own functions stay as they are
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        _forget()
        try:
            yield importlib.import_module(f"relora.method.{NAME}")
        finally:
            _forget()


def _forget() -> None:
    sys.modules.pop(f"relora.method.{NAME}", None)
    vars(relora.method).pop(NAME, None)
