"""A cluster without a network: a dataset of the hub that is in the caches is prepared and trained on, unasked."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from relora.cli import main
from relora.config.yaml12 import dump
from tests.helpers.tiny import all_metrics, settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def as_downloaded(corpus: Path, cache: Path) -> None:
    """Put `corpus` where `datasets` keeps what it has downloaded: as acme/words at COMMIT."""
    files = {"train": [str(path) for path in corpus.glob("*.jsonl")]}
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(cache / "made"))
    builder.download_and_prepare()
    folder = cache / "acme___words" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, folder)
    (folder / "json-train.arrow").rename(folder / "words-train.arrow")
    about = json.loads((folder / "dataset_info.json").read_text())
    about |= {"dataset_name": "words", "config_name": "default"}
    (folder / "dataset_info.json").write_text(json.dumps(about))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hosts that somebody tries to find or to connect to: nobody answers."""
    asked: list[Any] = []

    def refuse(*what: Any, **_: Any) -> None:
        asked.append(what)
        raise OSError("there is no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def test_a_dataset_in_the_caches_is_trained_on_without_a_network(
    corpus: Path, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "the tests run with HF_HUB_OFFLINE=1"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")
    as_downloaded(corpus, tmp_path / "huggingface")
    short = {"schedule": {"warmup_steps": 0, "restart_warmup_steps": 0}, "training__report_to": []}
    tree = settings(corpus, tmp_path / "run", training__max_steps=2, relora={"restart_every": None}, **short)
    tree["data"]["sources"] = [{"path": "acme/words"}]
    config = tmp_path / "c.yaml"
    config.write_text(dump(tree))
    assert main(["prepare", str(config)]) == 0
    assert main(["train", str(config)]) == 0
    assert [line["step"] for line in all_metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    assert asked == []
