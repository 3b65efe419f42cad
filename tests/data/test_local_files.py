"""What is wrong with sources, and the words in which it is said."""

import os
from pathlib import Path

import pytest

from relora.data import prepare, problems
from relora.data.sources import StdlibSource
from relora.errors import UserError


def problems_of(data, **keys):
    with pytest.raises(UserError) as caught:
        prepare(data, **{"vocab_size": 300, "tokenizer": None, "quiet": True, **keys})
    return caught.value.problems


def test_everything_cheap_is_reported_together(tmp_path, write, config):
    write(tmp_path / "good.jsonl", ["a"])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "odd.doc").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_text("x")
    data = config(
        str(tmp_path / "good.jsonl"),
        str(tmp_path / "god.jsonl"),
        str(tmp_path / "*.parquet"),
        str(tmp_path / "odd.doc"),
        str(tmp_path / "empty.jsonl"),
        str(tmp_path / "folder"),
        str(tmp_path / "pictures"),
        {"path": str(tmp_path / "good.jsonl"), "split": "test"},
        {"path": "python-stdlib", "split": "test"},
    )
    found = problems(data)
    expected = [
        ("data.sources[1].path", "god.jsonl", "no such file or folder", "nearest is 'good.jsonl'"),
        ("data.sources[2].path", "no file matches this pattern"),
        ("data.sources[3].path", "unknown extension of odd.doc", ".parquet, .json"),
        ("data.sources[4].path", "empty"),
        ("data.sources[5].path", "folder without .parquet"),
        ("data.sources[6].path", "folder without .parquet", ".png"),
        ("data.sources[7].path", "split = 'test'", "only ['train']"),
        ("data.sources[8].path", "only the split 'train'"),
    ]
    assert len(found) == len(expected)
    for line, pieces in zip(found, expected, strict=True):
        assert all(piece in line for piece in pieces), line
    assert problems_of(data, vocab_size=100) == [
        *found,
        "model.config.vocab_size = 100: a byte-level BPE needs at least 257 (data.tokenizer is null)",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path, write, config):
    path = write(tmp_path / "a.txt", ["secret"])
    Path(path).chmod(0)
    assert "permission denied" in problems(config(path))[0]


def test_too_long_text_file(tmp_path, config):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**31)
    assert "a text file is one document" in problems(config(str(tmp_path / "a.txt")))[0]


def test_folder_of_several_kinds(tmp_path, write, config):
    write(tmp_path / "f" / "a.txt", ["a"])
    write(tmp_path / "f" / "b.jsonl", ["b"])
    assert "several kinds {'json': 1, 'text': 1}" in problems(config(str(tmp_path / "f")))[0]


def test_folder_with_files_outside_its_splits(tmp_path, write, config):
    for name in ("train.jsonl", "test.jsonl", "other.jsonl"):
        write(tmp_path / "f" / name, ["a"])
    (line,) = problems(config(str(tmp_path / "f")))
    assert "1 files belong to none (such as other.jsonl)" in line


def test_missing_column_names_the_nearest(tmp_path, write, config):
    a = write(tmp_path / "a.jsonl", ["x", "y"], "texts")
    b = write(tmp_path / "b.jsonl", ["x", "y"], "body")
    lines = problems_of(config(a, b))
    assert len(lines) == 2
    assert "data.text_field = 'text'" in lines[0] and "['texts', 'n']; nearest is 'texts'" in lines[0]
    assert "data.sources[1]" in lines[1] and "['body', 'n']" in lines[1] and "nearest" not in lines[1]


def test_column_of_numbers(tmp_path, write, config):
    (line,) = problems_of(config(write(tmp_path / "a.jsonl", ["x", "y"]), text_field="n"))
    assert "data.text_field = 'n'" in line and "int64" in line and "not strings" in line


def test_no_documents(tmp_path, write, config):
    (line,) = problems_of(config(write(tmp_path / "a.jsonl", [None, None])))
    assert "no documents (2 rows, all without a text)" in line


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.parquet", "b.jsonl.gz", "b.csv"])
def test_binary_garbage_names_the_file(tmp_path, write, config, name):
    write(tmp_path / f"a{name[1:]}", ["good", "text"])
    (tmp_path / name).write_bytes(bytes(range(128, 256)) * 50)
    (line,) = problems_of(config(str(tmp_path / f"*{name[1:]}")))
    assert str(tmp_path / name) in line and "not readable as" in line


def test_hub_out_of_reach(config, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = problems_of(config("nobody/nothing"))
    assert "data.sources[0].path = 'nobody/nothing': no such file or folder here" in line


def test_stdlib_is_sorted_and_without_tests(config):
    files = StdlibSource(config("python-stdlib").sources[0]).files
    assert len(files) > 300 and list(files) == sorted(files)
    assert not [path for path in files if {"test", "tests", "idle_test", "site-packages"} & set(path.parts)]
