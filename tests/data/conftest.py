"""Small generated corpora, and folders of the test's own for every cache."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from relora.config.input_sections import DataSection
from relora.data import PreparedData, prepare

WORDS = [
    "the",
    "of",
    "rank",
    "low",
    "high",
    "update",
    "merge",
    "train",
    "loss",
    "weight",
    "début",
    "日本",
    "token",
    "row",
    "epoch",
    "seed\n",
]
VOCAB_SIZE = 300


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def documents() -> Callable[..., list[str]]:
    """n documents of 1 to 60 words, none twice."""

    def make(n: int, seed: int = 0) -> list[str]:
        draw = random.Random(seed)
        return [f"{seed}.{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for i in range(n)]

    return make


@pytest.fixture(scope="session")
def write() -> Callable[[Path, list[Any]], str]:
    """Documents -> a file in the format of its extension; its path."""

    def write_file(path: Path, texts: list[Any], column: str = "text") -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{column: text, "n": i} for i, text in enumerate(texts)]
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if kind == "parquet":
            pyarrow.parquet.write_table(pa.table({column: texts, "n": list(range(len(texts)))}), path)
            return str(path)
        content = {
            "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
            "json": lambda: json.dumps(rows),
            "csv": lambda: f"n,{column}\n" + "".join(f'{i},"{quoted(text)}"\n' for i, text in enumerate(texts)),
            "txt": lambda: "".join(texts),
        }[kind]()
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            file.write(content)
        return str(path)

    return write_file


def quoted(text: str | None) -> str:
    return (text or "").replace('"', '""')


def section(*paths: str | dict[str, Any], **keys: Any) -> DataSection:
    sources = [path if isinstance(path, dict) else {"path": path} for path in paths]
    defaults = {"sequence_length": 32, "eval_fraction": 0.2, "num_proc": 1, "num_workers": 0}
    return DataSection.model_validate({"sources": sources, **defaults, **keys})


@pytest.fixture(scope="session")
def config() -> Callable[..., DataSection]:
    return section


@pytest.fixture(scope="session")
def prepared_of() -> Callable[[DataSection], PreparedData]:
    return lambda data: prepare(data, vocab_size=VOCAB_SIZE, tokenizer=None, quiet=True)


@pytest.fixture
def two_sources(tmp_path, documents, write, config):  # type: ignore[no-untyped-def]
    """Configuration of two sources, 3 : 1."""
    one = write(tmp_path / "one.jsonl", documents(60, seed=1))
    two = write(tmp_path / "two.jsonl", documents(40, seed=2))
    return lambda **keys: config({"path": one, "weight": 3.0}, {"path": two}, **keys)


@pytest.fixture
def data(two_sources: Callable[..., DataSection]) -> DataSection:
    return two_sources()


@pytest.fixture
def prepared(data: DataSection, prepared_of: Callable[[DataSection], PreparedData]) -> PreparedData:
    return prepared_of(data)
