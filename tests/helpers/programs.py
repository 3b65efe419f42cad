"""Programs that tests start: bounded in time, and gone with all their children afterwards."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(command: Sequence[str], *, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    """Run `command` at the root of the repository and return what it printed.

    Raises:
        subprocess.TimeoutExpired: it took longer; it and every process it started have been killed.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            printed, complained = process.communicate(timeout=timeout_s)
        finally:
            end_group(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, printed, complained)


def end_group(leader: int) -> None:
    """Kill what is left of a process group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
