"""Each format gives the same documents."""

import os

import pytest
from datasets import Dataset

from relora.data import problems
from relora.data.sources import find_sources, load_sources
from relora.errors import UserError


def texts_of(data):
    sources, problems = find_sources(data)
    assert not problems
    return [text for source in load_sources(sources, data.text_field, 1) for text in source["text"]]


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


def test_a_folder_with_a_configuration_is_known_by_its_content(tmp_path, config, prepared_of):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: small\n  data_files: a.jsonl\n---\n")
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    data = config({"path": str(folder), "name": "small"}, eval_fraction=1e-9)
    first, before = prepared_of(data), (folder / "a.jsonl").stat()
    (folder / "a.jsonl").write_text('{"text": "two"}\n')
    os.utime(folder / "a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    second = prepared_of(data)
    assert first.folder != second.folder and texts_of(data) == ["two"]


def test_hub_ids_are_passed_on(config, monkeypatch):
    asked = []

    def load_dataset(*args, **keys):
        asked.append((args, keys))
        return Dataset.from_dict({"text": ["a"], "url": ["b"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = {"path": "allenai/c4", "name": "en", "split": "validation", "revision": "abc"}
    assert texts_of(config(source)) == ["a"]
    assert asked == [(("allenai/c4", "en"), {"split": "validation", "revision": "abc", "num_proc": 1})]


# --- a user's own kind

CUSTOM = "tests.helpers.custom_sources"


def one(config, attribute, **keys):
    return config({"path": f"{CUSTOM}:{attribute}", **keys})


def test_a_users_own_source_is_prepared_and_read(config, prepared_of, monkeypatch):
    data = one(config, "Countdown", name="30")
    prepared = prepared_of(data)
    record = prepared.manifest.sources[0]
    assert record.train.documents + record.eval.documents == 30 and record.skipped_nulls == 1
    assert prepared.manifest.made_from["sources"] == [
        {"source": f"{CUSTOM}:Countdown", "version": 1, "num_documents": "30"}
    ]
    samples = prepared.samples(data, 0)
    text = prepared.tokenizer().decode(samples[0]["input_ids"])
    assert set(text.replace("<|endoftext|>", " ").split()) <= {"left", "ft", "t", "eft", *map(str, range(31))}
    # What it is made from decides whether it is made again: the import path, and what the source says of itself.
    assert prepared_of(one(config, "ten")).folder != prepared.folder == prepared_of(data).folder
    monkeypatch.setattr("tests.helpers.custom_sources.Countdown.version", 2)
    assert prepared_of(data).folder != prepared.folder


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Countdown", ".path = '{path}': name must be the number of documents"),
        ("Unknown", ".path = {path}: cannot be imported (module '{module}' has no attribute 'Unknown')"),
        ("broken", ".path = {path}: KeyError: '{path}'"),
        ("no_source", ".path = {path}: must make a relora.data.sources.Source, not a str"),
        ("Source", ".path = {path}: TypeError: Can't instantiate abstract class Source"),
    ],
)
def test_a_users_own_source_that_cannot_serve(config, name, problem):
    (line,) = problems(one(config, name))
    expected = problem.format(path=f"{CUSTOM}:{name}", module=CUSTOM)
    assert line.startswith(f"data.sources[0]{expected}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Columnless", "data.text_field = 'text': it has only the columns ['txt']"),
        ("Unreachable", "the server does not answer"),
    ],
)
def test_failures_of_a_users_own_source_name_it(config, prepared_of, name, problem):
    with pytest.raises(UserError) as caught:
        prepared_of(one(config, name, name="3"))
    assert caught.value.problems[0].startswith(f"data.sources[0].path = '{CUSTOM}:{name}': {problem}")


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path, documents, write, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shelf:books" / "a.jsonl", documents(3))
    assert texts_of(config("shelf:books")) == documents(3)
