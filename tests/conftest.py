"""Fixtures: a cache of its own for each session, a corpus that can be learned, and a tiny run over it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.config import check
from tests.helpers.tiny import settings, write_corpus


def pytest_configure() -> None:
    # Before any test module imports the hub's client, which reads it once.
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest file first: where several run at once, it would be alone at the end.
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tiny models: more threads only fight with the processes that tests start.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with jsonl documents, some of two words and some of hundreds."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that has finished."""
    from relora.train.train import train  # imports the hub's client

    tree = settings(corpus, tmp_path_factory.mktemp("finished") / "run")
    train(check(tree))
    return Path(tree["output_dir"])


@pytest.fixture
def tiny_run(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a tiny run: `tiny_run(name, **overrides)` with overrides as `section__key=value`."""
    return lambda name="run", **overrides: settings(corpus, tmp_path / name, **overrides)
