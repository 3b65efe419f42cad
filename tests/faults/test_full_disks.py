"""A disk that is full ends a command with one line, and the same command goes on when there is room.

All sizes of a disk, on one that is mounted: `python -m benchmarks.full_disk`.
"""

import errno
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from relora.cli import main
from relora.config.yaml12 import dump
from relora.errors import EXIT_FAILED
from relora.tracking.tracker import SinkContext, TensorBoard
from tests.helpers import tiny
from tests.helpers.full_disk import no_file_over

KIB = 2**10
Settings = Callable[..., dict[str, Any]]


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of relora on stderr, warnings aside; no traceback stands beside it."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    [line] = [
        text
        for text in printed.replace("\r", "\n").splitlines()
        if text.startswith("relora: ") and not text.startswith("relora: warning: ")
    ]
    return line


@pytest.mark.parametrize(("limit", "num_proc"), [(8 * KIB, 1), (32 * KIB, 1), (24 * KIB, 2)])
def test_preparation(limit: int, num_proc: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer, which is written in Rust, does not fit; or the tokens, of which other processes write a part."""
    (tmp_path / "corpus").mkdir()
    corpus = tiny.write_corpus(tmp_path / "corpus", num_documents=600)
    tree = tiny.settings(corpus, tmp_path / "run", data__num_proc=num_proc)
    (tmp_path / "c.yaml").write_text(dump(tree))
    elsewhere, here = (f"data.prepared_dir={tmp_path / name}" for name in ("elsewhere", "here"))
    assert main(["prepare", str(tmp_path / "c.yaml"), elsewhere]) == 0  # the cache of datasets has the texts then
    capsys.readouterr()
    datasets.disable_progress_bars()
    with no_file_over(limit):
        assert main(["prepare", str(tmp_path / "c.yaml"), here]) == EXIT_FAILED
    datasets.enable_progress_bars()
    assert line_of(capsys).startswith(f"relora: {tmp_path / 'here'}: File too large; the same command goes on")
    assert not (tmp_path / "here" / "manifest.json").exists()
    assert main(["prepare", str(tmp_path / "c.yaml"), here]) == 0
    hashes = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("elsewhere", "here")]
    assert hashes[0]["content_hash"] == hashes[1]["content_hash"]


def test_metrics(tiny_run: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_run(training__report_to=[], training__max_steps=6)
    (tmp_path / "c.yaml").write_text(dump(tree))
    run = Path(tree["output_dir"])
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("/dev/full")  # opens as a file, and has no room for a byte
    assert main(["train", str(tmp_path / "c.yaml")]) == EXIT_FAILED
    assert line_of(capsys).startswith(f"relora: {run}: No space left on device; the same command goes on")
    assert str(run) in (run / "status.json").read_text()
    (run / "metrics.jsonl").unlink()
    assert main(["train", str(tmp_path / "c.yaml")]) == 0
    assert [line["step"] for line in tiny.metrics(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = threading.excepthook
    board = TensorBoard(SinkContext(tmp_path, start_step=None, cycle=0, total_steps=9, hparams={}))
    with no_file_over(4 * KIB), pytest.raises(OSError, match="File too large") as raised:
        for step in range(1000):
            board.metrics({"step": step, "loss": 2.0})
            board.sync(step)
    assert raised.value.errno == errno.EFBIG
    with pytest.raises(OSError, match="File too large"):  # what it could not write is still not written
        board.close()
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is hook


def test_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    assert main(["report", str(run), "--output", str(folder)]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with no_file_over(8 * KIB):
        assert main(["report", str(run), "--output", str(folder)]) == EXIT_FAILED
    assert line_of(capsys).startswith(f"relora: {folder / 'overview.png'}: File too large")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model fits, the tokenizer does not."""
    copy = shutil.copytree(run, tmp_path / "copy")
    sizes = [path.stat().st_size for path in (run / "final").glob("*") if path.suffix == ".safetensors"]
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    command = ["export", str(copy), "--output", str(tmp_path / "exported"), "--dtype", "bfloat16"]
    assert tokenizer.stat().st_size < max(sizes)
    with no_file_over(8 * KIB):
        assert main(command) == EXIT_FAILED
    assert "the model could not be written (" in line_of(capsys)
    assert not list(tmp_path.glob("*exported*"))
    assert main(command) == 0


def test_a_full_disk_found_before_a_run_is_no_mistake_of_its_settings(
    tiny_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(dump(tiny_run()))

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / ".relora-trial"))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert main(["train", str(tmp_path / "c.yaml")]) == EXIT_FAILED
    assert line_of(capsys).startswith(f"relora: {tmp_path}: No space left on device; the same command goes on")
