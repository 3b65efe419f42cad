"""One of several processes fails: terminal, status.json and exit code tell of its error, not of what followed."""

import json
import socket
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.end_to_end.test_launch_files import free_port, with_environment
from tests.helpers.launch import written
from tests.helpers.programs import ROOT, run
from tests.helpers.tiny import settings

sys.path.insert(0, str(ROOT / "launch"))
import torchrun

BUG = """
import os

from torch.optim import AdamW


def optimizer(groups, settings):
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("the true error")
    return AdamW(groups, lr=settings["lr"])
"""


def test_of_two_processes_the_one_that_failed_is_named_with_its_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BUG)
    config = written(settings(corpus, tmp_path / "run", optim__name="mine:optimizer"), tmp_path)
    place = {"NNODES": "1", "NODE_RANK": "0", "NPROC_PER_NODE": "2", "PYTHON": sys.executable}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    place |= {"LOG_DIR": str(tmp_path / "logs")}
    result = run([*with_environment(place), "bash", "launch/torchrun_multinode.sh", str(config)])
    assert result.returncode == 1, result.stderr[-3000:]
    end = result.stderr[result.stderr.index("torchrun: process 1 failed first (local rank 1, pid ") :]
    assert "Traceback" in end and "ZeroDivisionError: the true error" in end
    reason = json.loads((tmp_path / "run/status.json").read_text())["reason"]
    assert reason.startswith(f"process 1 (host {socket.gethostname()}, pid ")
    assert ") failed: ZeroDivisionError: the true error; here followed " in reason
    assert "\n[1]: ZeroDivisionError: the true error" in result.stderr.replace("[rank1]: ", "")
    [log] = (tmp_path / "logs").glob("*/*/attempt_0/1/stderr.log")
    assert "ZeroDivisionError: the true error" in log.read_text()


def failure(folder: Path, rank: int, code: int, message: str | None, time_s: int) -> ProcessFailure:
    """Of a process that has ended with `code` and left `message`; None: nothing."""
    path = folder / f"{rank}.json"
    if message is not None:
        path.write_text(json.dumps({"message": message, "timestamp": time_s}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(path))


ENDS = {
    "a mistake": ({0: (2, "relora: seed: unknown key", 5)}, 2, "process 0 failed first", "relora: seed: unknown key"),
    "what follows in the same second": (
        {0: (1, "relora: process 3 (host a, pid 9) failed: E: e; here followed X: x", 5), 3: (1, "T\nE: e", 5)},
        1,
        "process 3 failed first (local rank 3, pid 103, exit code 1):\nT\nE: e",
        "process 0 (local rank 0, pid 100, exit code 1): relora: process 3 (host a, pid 9) failed: E: e; here",
    ),
    "killed": ({1: (-9, None, 0)}, 137, "process 1 failed first", "ended by SIGKILL"),
    "stopped": ({0: (143, "relora: received SIGTERM: ended after update 7", 5)}, 143, "process 0", "update 7"),
    "without a word": ({0: (1, None, 0)}, 1, "process 0", "it left no message"),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_launcher_ends_with_the_code_and_the_words_of_the_process_that_failed_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes, code, *said = ENDS[name]
    failures = {rank: failure(tmp_path, rank, *what) for rank, what in processes.items()}

    def fails(_: object) -> None:
        raise torchrun.ChildFailedError("relora", failures)

    monkeypatch.setattr(torchrun, "run", fails)
    monkeypatch.setattr(torchrun, "parse_args", lambda _: None)
    assert torchrun.main() == code
    printed = capsys.readouterr().err
    assert [part for part in said if part not in printed] == []
