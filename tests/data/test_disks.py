"""Caches that cannot be written to: the message names the folder, and what chooses another."""

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pytest

from relora.cli import main
from relora.config.yaml12 import dump
from tests.helpers import tiny

# No folder can be made in it, whoever asks.
NOWHERE = "/proc/none"


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A source of 3 MiB, larger than the disk of `full_disk`."""
    tree = tiny.settings(tmp_path / "text.jsonl", tmp_path / "run")
    (tmp_path / "text.jsonl").write_text(3000 * (json.dumps({"text": "word " * 200}) + "\n"))
    (tmp_path / "c.yaml").write_text(dump(tree))
    return str(tmp_path / "c.yaml")


@pytest.fixture
def full_disk(config: str) -> Iterator[str]:
    """The configuration; no file of this process can grow over 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield config
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("relora: ")]
    return line


def test_a_full_disk_of_the_datasets_cache(
    full_disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    assert main(["prepare", full_disk]) == 2
    assert f"datasets cannot write to its cache {cache!r} (File too large); the variable" in line_of(capsys)


def test_a_home_that_cannot_be_written_to(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{NOWHERE}/datasets")
    assert main(["prepare", config]) == 2
    assert f"datasets cannot write to its cache '{NOWHERE}/datasets' (" in line_of(capsys)


def test_the_cache_of_prepared_data_is_no_setting(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELORA_CACHE", NOWHERE)
    assert main(["prepare", config]) == 2
    line = line_of(capsys)
    assert line.startswith(f"relora: the cache '{NOWHERE}/prepared/")
    assert "(data.prepared_dir or the variable RELORA_CACHE chooses another folder): not a folder to write to" in line


def test_an_output_folder_is_tried_before_the_data_are_prepared(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    assert main(["train", config, f"output_dir={NOWHERE}/run"]) == 2
    assert line_of(capsys).startswith(f"relora: output_dir = {NOWHERE}/run: /proc cannot be written to (")
    assert not (tmp_path / "cache").exists()
    before = sorted(tmp_path.iterdir())
    assert main(["train", config, "data.sources=[{path: none.txt}]"]) == 2  # the trial leaves nothing
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "run"] == before
