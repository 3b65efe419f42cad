"""Each format gives the same documents."""

import pytest
from datasets import Dataset

from relora.data.sources import load_sources


def texts_of(data):
    return [text for source in load_sources(data, 1) for text in source["text"]]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.csv", "a.csv.gz"])
def test_tables(tmp_path, documents, write, config, name):
    texts = documents(20)
    assert texts_of(config(write(tmp_path / name, texts))) == texts


@pytest.mark.parametrize("extension", ["txt", "txt.gz"])
def test_a_text_file_is_one_document(tmp_path, documents, write, config, extension):
    texts = ["two\n\nparagraphs\n", *documents(3)]
    for i, text in enumerate(texts):
        write(tmp_path / "f" / f"{i}.{extension}", [text])
    (tmp_path / "f" / "README.md").write_text("not data")
    assert texts_of(config(str(tmp_path / "f"))) == texts
    assert texts_of(config(str(tmp_path / "f" / f"*.{extension}"), text_field="body")) == texts


def test_globs_go_deep_and_take_brackets_in_folder_names(tmp_path, write, config):
    write(tmp_path / "[x]" / "a.jsonl", ["1"])
    write(tmp_path / "y" / "z" / "b.jsonl", ["2"])
    assert texts_of(config(str(tmp_path / "**" / "*.jsonl"))) == ["1", "2"]
    assert texts_of(config(str(tmp_path / "[x]"))) == ["1"]


def test_splits_of_a_folder(tmp_path, write, config):
    folder = tmp_path / "f"
    write(folder / "train-0.jsonl", ["1", "2"])
    write(folder / "train-1.jsonl", ["3"])
    write(folder / "test.jsonl", ["4"])
    assert texts_of(config(str(folder))) == ["1", "2", "3"]
    assert texts_of(config({"path": str(folder), "split": "test"})) == ["4"]
    assert texts_of(config({"path": str(folder), "split": "train+test"})) == ["1", "2", "3", "4"]
    assert texts_of(config({"path": str(folder), "split": "train[:1]"})) == ["1"]


def test_hub_ids_are_passed_on(config, monkeypatch):
    asked = []

    def load_dataset(*args, **keys):
        asked.append((args, keys))
        return Dataset.from_dict({"text": ["a"], "url": ["b"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = {"path": "allenai/c4", "name": "en", "split": "validation", "revision": "abc"}
    assert texts_of(config(source)) == ["a"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "revision": "abc", "num_proc": 1})]
