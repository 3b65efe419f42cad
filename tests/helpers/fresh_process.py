"""Run a function in a process of its own, which has done nothing yet but import: what it changes ends with it.

Python's fork server imports once and is forked for each. A fork of the tests' own process would not do: autograd
counts the devices at a process's first backward pass.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

T = TypeVar("T")
# An import that fails in the server is no error there: the processes then import for themselves, which takes seconds.
PRELOADED = [
    *(f"tests.helpers.{name}" for name in ("rehearsal", "launch", "deepspeed_on_cpu")),
    *("torch.utils.tensorboard", "matplotlib.backends.backend_agg", "matplotlib.figure"),
]
CONTEXT = multiprocessing.get_context("forkserver")


def fresh_process(function: Callable[..., Any], *args: Any, is_daemon: bool) -> ForkServerProcess:
    """A process that has started on `function`; only one that is no daemon may start others. All is pickled."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    process = CONTEXT.Process(target=function, args=args, daemon=is_daemon)
    process.start()
    return process


def in_a_fresh_process(function: Callable[..., T], *args: Any, timeout_s: float = 120) -> T:
    """What `function` returns; it and its arguments are pickled.

    Raises:
        AssertionError: it raised, with its traceback, or was not done in time.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = fresh_process(_send, theirs, function, args, is_daemon=True)
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
