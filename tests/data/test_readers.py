"""One column of many files, and the file and line that cannot be read."""

import bz2
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset

from relora.data import prepare, problems
from relora.data.readers import first_fault
from relora.data.sources import find_sources, load_sources
from relora.errors import UserError


def texts_of(data, num_proc=1):
    sources, found = find_sources(data)
    assert not found
    return [text for source in load_sources(sources, data.text_field, num_proc) for text in source["text"]]


def failure_of(data, num_proc=1):
    with pytest.raises(UserError) as caught:
        load_sources(find_sources(data)[0], data.text_field, num_proc)
    (line,) = caught.value.problems
    return line


def table(path, **columns):
    """A file of these columns in the format of its extension."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(columns), path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_file(path, pa.table(columns).schema) as file:
            file.write(pa.table(columns))
    elif path.suffix == ".csv":
        pa.table(columns).to_pandas().to_csv(path, index=False)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_other_columns_may_differ_from_file_to_file(tmp_path, config, kind):
    folder = tmp_path / "f"
    table(folder / f"a.{kind}", text=["one", "x"], score=[1, 2])
    table(folder / f"b.{kind}", score=["high", "low"], text=["two", "y"], language=["en", "de"])
    table(folder / f"c.{kind}", text=["three", "z"])
    assert texts_of(config(str(folder / f"*.{kind}"))) == ["one", "x", "two", "y", "three", "z"]


def test_nested_columns_and_keys_that_are_left_out(tmp_path, config):
    rows = [{"text": "1", "meta": {"a": 1}}, {"meta": {"b": ["x"]}}, {"text": "3", "more": None}]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    assert texts_of(config(str(tmp_path / "*.jsonl"))) == ["1", None, "3"]


def test_more_suffixes(tmp_path, config):
    (tmp_path / "a.ndjson").write_text('{"text": "1"}\n')
    (tmp_path / "a.tsv").write_text("n\ttext\n1\tone, two\n")
    with bz2.open(tmp_path / "b.jsonl.bz2", "wt") as file:
        file.write('{"text": "2"}\n')
    with lzma.open(tmp_path / "c.jsonl.xz", "wt") as file:
        file.write('{"text": "3"}\n')
    (tmp_path / "D.TXT").write_text("4")
    for name in ("n.md", "n.py", "n.rst", "n.html"):
        (tmp_path / name).write_text(name)
        assert texts_of(config(str(tmp_path / name))) == [name]
    for name, text in (("a.ndjson", "1"), ("a.tsv", "one, two"), ("b.*", "2"), ("c.*", "3"), ("D.TXT", "4")):
        assert texts_of(config(str(tmp_path / name))) == [text]


def test_an_arrow_stream_as_datasets_writes_it(tmp_path, config):
    Dataset.from_dict({"text": ["1", "2"], "n": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert texts_of(config(str(tmp_path / "saved" / "*.arrow"))) == ["1", "2"]


ROWS = [json.dumps({"text": f"row {number}"}).encode() for number in range(40)]


@pytest.mark.parametrize(
    ("name", "line", "reason", "num_proc"),
    [
        ("b.jsonl", b'{"text": "caf\xe9"}', "line 31: byte 0xe9 at column 14 is not UTF-8", 1),
        ("b.jsonl", b'{"text": "caf\xe9"}', "line 31: byte 0xe9 at column 14 is not UTF-8", 2),
        ("b.jsonl", b'{"text": "cut', "line 31: ", 1),
        ("b.txt", b"caf\xe9", "line 31: byte 0xe9 at column 4 is not UTF-8", 1),
        ("b.csv", b"caf\xe9", "line 31: byte 0xe9 at column 4 is not UTF-8", 1),
    ],
)
def test_one_bad_row_among_many_is_named(tmp_path, config, name, line, reason, num_proc):
    suffix = name[1:]
    rows = ROWS if suffix == ".jsonl" else [b"text", *(b"row" for _ in ROWS)]
    (tmp_path / f"a{suffix}").write_bytes(b"\n".join(rows) + b"\n")
    (tmp_path / name).write_bytes(b"\n".join([*rows[:30], line, *rows[30:]]) + b"\n")
    message = failure_of(config(str(tmp_path / f"*{suffix}")), num_proc)
    assert f"{tmp_path / name}, {reason}" in message and "RemoteTraceback" not in message


def test_bytes_that_are_no_text_in_a_table(tmp_path, config):
    texts = pa.array(["good", "bad"]).cast(pa.binary())
    bad = pa.StringArray.from_buffers(2, texts.buffers()[1], pa.py_buffer(b"goodb\xe9d"))
    pyarrow.parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert str(tmp_path / "a.parquet") in failure_of(config(str(tmp_path / "a.parquet")))


def test_no_fault_is_found_in_good_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(ROWS))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(ROWS))  # with a byte order mark
    assert first_fault([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "json") is None


# --- folders


def folder_of(tmp_path, names):
    for name in names:
        (tmp_path / "f").mkdir(exist_ok=True, parents=True)
        (tmp_path / "f" / name).write_text(name)
    return str(tmp_path / "f")


def test_names_as_of_splits_do_not_divide_a_folder_of_texts(tmp_path, config):
    names = ["a.txt", "libfoo-dev.txt", "my-test.txt", "valid.txt", "z.txt"]
    folder = folder_of(tmp_path, names)
    assert texts_of(config(folder)) == names
    (line,) = problems(config({"path": folder, "split": "test"}))  # asked for: then names count
    assert "3 files belong to none" in line or "2 files belong to none" in line


def test_a_folder_of_one_split_only(tmp_path, config):
    folder = folder_of(tmp_path, ["dev-1.txt", "dev-2.txt"])
    assert texts_of(config(folder)) == ["dev-1.txt", "dev-2.txt"]
    assert texts_of(config({"path": folder, "split": "validation"})) == ["dev-1.txt", "dev-2.txt"]


def test_the_advice_about_files_of_no_split_works(tmp_path, config):
    folder = folder_of(tmp_path, ["train.txt", "test.txt", "other.txt"])
    (line,) = problems(config(folder))
    pattern = line.split("such as ")[-1]
    assert pattern == f"{folder}/**/*.txt"
    assert texts_of(config(pattern)) == ["other.txt", "test.txt", "train.txt"]


def test_what_lies_beside_data_is_no_data(tmp_path, config):
    folder = folder_of(tmp_path, ["README.md", "load.py", "a.txt"])
    assert texts_of(config(folder)) == ["a.txt"]
    only_text = folder_of(tmp_path / "g", ["README.md", "load.py"])
    assert texts_of(config(only_text)) == ["README.md", "load.py"]


# --- few and long documents


def test_few_held_out_documents_are_said(tmp_path, documents, write, config, caplog):
    data = config(write(tmp_path / "a.jsonl", documents(30)), eval_fraction=0.1)
    prepared = prepare(data, vocab_size=300, tokenizer=None)
    held_out = prepared.manifest.sources[0].eval.documents
    assert 0 < held_out < 10 and f"only {held_out} documents are held out" in caplog.text
    caplog.clear()
    prepare(data.model_copy(update={"eval_fraction": 0.6}), vocab_size=300, tokenizer=None)
    assert "held out" not in caplog.text


def test_quotas_that_may_be_off_by_more_than_a_sample_are_said(tmp_path, documents, write, config, caplog):
    paths = [write(tmp_path / f"{number}.jsonl", documents(30, seed=number)) for number in range(12)]
    uneven = config(*({"path": path, "weight": 1.7**k + 1e-7} for k, path in enumerate(paths)), eval_fraction=0.5)
    prepare(uneven, vocab_size=300, tokenizer=None)
    assert "the weights of data.sources have no common unit" in caplog.text
    caplog.clear()
    prepare(config(*paths, eval_fraction=0.5), vocab_size=300, tokenizer=None)
    assert "common unit" not in caplog.text
