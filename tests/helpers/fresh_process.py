"""Run a function in a process of its own, which has done nothing yet but import: what it changes ends with it.

Python's fork server imports once and is forked for each. A fork of the tests' own process would not do: autograd
counts the devices at a process's first backward pass.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
PRELOADED = ["tests.helpers.rehearsal", "torch.utils.tensorboard"]


def in_a_fresh_process(function: Callable[..., T], *args: Any, timeout_s: float = 120) -> T:
    """What `function` returns; it and its arguments are pickled.

    Raises:
        AssertionError: it raised, with its traceback, or was not done in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, args), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(timeout_s), f"{function.__name__} was not done after {timeout_s} s"
        result, problem = ours.recv()
    finally:
        process.kill()
        process.join()
    assert problem is None, problem
    return result


def _send(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        connection.send((function(*args), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))
