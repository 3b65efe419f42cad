import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relora.data import amount_problems, find_prepared, open_prepared, prepare
from relora.data import tokenize as writing
from relora.data.sources import StdlibSource
from relora.data.split import is_held_out
from relora.errors import UserError

prepare_module = importlib.import_module("relora.data.prepare")  # its name is also that of the function
PREPARE = (
    "import sys, importlib; from relora.config.input_sections import DataSection; import relora.data.tokenize as w;"
    "p = importlib.import_module('relora.data.prepare');"
    "data = DataSection.model_validate_json(sys.argv[1]); w.PIECE_BYTES = 2000\n"
    "%s\n"
    "print(p.prepare(data, vocab_size=300, tokenizer=None, quiet=True).manifest.content_hash)"
)


def start(data, patch=""):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE % patch, data.model_dump_json()], stdout=subprocess.PIPE, text=True
    )


def decoded(prepared, source=0):
    """The documents of both sides as texts: (train, eval)."""
    tokenizer = prepared.tokenizer()
    sides = []
    for side in ("train", "eval"):
        stream = prepared.streams(side, 10**9)[source]
        row = stream.row(0) if stream.num_rows else None
        ends = [*row.starts[1:], len(row.tokens)] if row else []
        sides.append(
            [tokenizer.decode(row.tokens[a : b - 1]) for a, b in zip(row.starts if row else [], ends, strict=True)]
        )
        assert row is None or all(row.tokens[end - 1] == prepared.manifest.eos_token_id for end in ends)
    return sides


def test_documents_come_back_in_order_each_on_its_side(tmp_path, documents, write, config, prepared_of):
    texts = documents(100)
    prepared = prepared_of(config(write(tmp_path / "a.jsonl", texts)))
    assert decoded(prepared) == [
        [text for text in texts if not is_held_out(text, 0.2)],
        [text for text in texts if is_held_out(text, 0.2)],
    ]
    record = prepared.manifest.sources[0]
    assert record.train.documents + record.eval.documents == 100 and record.eval.documents > 5
    assert prepared.manifest.token_dtype == "uint16"


def test_duplicates_fall_on_one_side_in_all_sources(tmp_path, documents, write, config, prepared_of):
    shared = documents(60)
    a = write(tmp_path / "a.jsonl", shared + documents(20, seed=1) + shared)
    b = write(tmp_path / "b.txt", [shared[0]])
    c = write(tmp_path / "c.parquet", shared[::-1])
    prepared = prepared_of(config(a, b, c, eval_fraction=0.4))
    sides = [decoded(prepared, source) for source in range(3)]
    train = {text for side in sides for text in side[0]}
    held_out = {text for side in sides for text in side[1]}
    assert len(train) > 20 and len(held_out) > 20 and not train & held_out


def test_nulls_and_empty_texts_are_skipped_and_counted(tmp_path, write, config, prepared_of, caplog):
    texts = ["a", None, "", "b", None, None, "c"]
    prepared = prepared_of(config(write(tmp_path / "a.jsonl", texts), eval_fraction=1e-9))
    record = prepared.manifest.sources[0]
    assert (record.train.documents, record.skipped_nulls, record.skipped_empty) == (3, 3, 1)
    assert "skipped 3 rows without a text" in caplog.text
    assert "skipped 3 null and 1 empty texts" in prepared.summary()


def test_num_proc_and_pieces_change_nothing_but_the_files(tmp_path, two_sources, prepared_of, monkeypatch):
    results = []
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)  # the command sets it for its process
    for num_proc, piece_bytes in ((1, 10**9), (2, 10**9), (3, 1000)):
        monkeypatch.setenv("RELORA_CACHE", str(tmp_path / f"cache{num_proc}"))
        monkeypatch.setattr(writing, "PIECE_BYTES", piece_bytes)
        data = two_sources(num_proc=num_proc)
        environment = os.environ
        prepared = prepared_of(data)
        assert os.environ is environment and "TOKENIZERS_PARALLELISM" not in environment
        rows = [s.row(r).tokens.tolist() for s in prepared.streams("train", 32) for r in range(s.num_rows)]
        results.append((prepared, rows))
    first, *others = results
    files = {sum(len(source.train.files) for source in prepared.manifest.sources) for prepared, _ in results}
    assert len(files) == 3
    for prepared, rows in others:
        assert prepared.manifest.content_hash == first[0].manifest.content_hash and rows == first[1]


EOS = "<|endoftext|>"
CORPORA = (["ab", "cd"], ["ab", "ce"], ["abcd"], [f"ab{EOS}cd"], [f"a{EOS}b", "c"], ["a", f"b{EOS}c"], ["ab", "cd"])


def test_content_hash_knows_tokens_and_borders(tmp_path, write, config):
    hashes = []
    for i, texts in enumerate(CORPORA):
        data = config(write(tmp_path / str(i) / "a.jsonl", texts), eval_fraction=1e-9)
        hashes.append(prepare(data, vocab_size=257, tokenizer=None, quiet=True).manifest.content_hash)
    assert len(set(hashes[:-1])) == len(CORPORA) - 1 and hashes[-1] == hashes[0]


def test_what_changes_the_folder_and_what_does_not(two_sources, prepared_of):
    data = two_sources()
    folder = prepared_of(data).folder
    same = {"sequence_length": 16, "eval_tokens": 64, "document_mask": True, "num_proc": 2, "num_workers": 1}
    assert find_prepared(data.model_copy(update=same), vocab_size=300, tokenizer=None).folder == folder
    for change in ({"eval_fraction": 0.3}, {"sources": data.sources[:1]}, {"sources": data.sources[::-1]}):
        assert find_prepared(data.model_copy(update=change), vocab_size=300, tokenizer=None) is None
    assert find_prepared(data, vocab_size=301, tokenizer=None) is None
    assert find_prepared(data.model_copy(update={"document_characters": 50}), vocab_size=300, tokenizer=None) is None


def test_a_source_is_known_by_its_content(two_sources, prepared_of):
    """Not by its name, size and time of change, which an edit may keep and a copy may lose."""
    data = two_sources()
    first = prepared_of(data)
    path = Path(data.sources[0].path)
    os.utime(path, (1, 1))
    assert find_prepared(data, vocab_size=300, tokenizer=None) == first
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"rank", b"knar"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert find_prepared(data, vocab_size=300, tokenizer=None) is None
    second = prepared_of(data)
    assert second.manifest.content_hash != first.manifest.content_hash
    assert "knar" in " ".join(decoded(second)[0]) and "rank" not in " ".join(decoded(second)[0])


def test_complete_data_are_not_made_again(two_sources, prepared_of, monkeypatch):
    data = two_sources()
    first = prepared_of(data)
    monkeypatch.setattr(prepare_module, "write_prepared", None)
    assert prepared_of(data) == first == open_prepared(first.folder)


def test_data_folder_may_move(tmp_path, write, config, prepared_of, documents):
    write(tmp_path / "here" / "a" / "x.jsonl", documents(30))
    folder = prepared_of(config(str(tmp_path / "here"))).folder
    (tmp_path / "here").rename(tmp_path / "there")
    assert find_prepared(config(str(tmp_path / "there")), vocab_size=300, tokenizer=None).folder == folder


def test_prepared_dir_of_something_else_is_refused_and_kept(tmp_path, documents, write, config, prepared_of):
    path = write(tmp_path / "a.jsonl", documents(30))
    data = config(path, prepared_dir=str(tmp_path / "out"))
    manifest = prepared_of(data).manifest
    for fold in (prepared_of, lambda data: find_prepared(data, vocab_size=300, tokenizer=None)):
        with pytest.raises(UserError, match="made from something else") as caught:
            fold(data.model_copy(update={"eval_fraction": 0.5, "text_field": "body"}))
        assert "eval_fraction: was 0.2, is 0.5" in str(caught.value) and "text_field: was 'text'" in str(caught.value)
    assert open_prepared(tmp_path / "out").manifest == manifest
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files and no manifest.json \(such as thesis.tex\)"):
        prepared_of(config(path, prepared_dir=str(tmp_path / "mine")))
    with pytest.raises(UserError, match="not a folder to write to"):
        prepared_of(config(path, prepared_dir=path))


KILLED = """
import os
written = []
write_piece = w.write_piece
def killed_at_the_fourth(*args, **keys):
    if len(written) == 3:
        os.kill(os.getpid(), 9)
    written.append(write_piece(*args, **keys))
    return written[-1]
w.write_piece = killed_at_the_fourth
"""


def test_a_killed_preparation_goes_on_with_finished_pieces(two_sources):
    data = two_sources()
    process = start(data, KILLED)
    assert process.wait(60) == -signal.SIGKILL
    (folder,) = (Path(os.environ["RELORA_CACHE"]) / "prepared").iterdir()
    finished = {path: path.stat().st_mtime_ns for path in (folder / "tokens").glob("*.arrow")}
    assert len(finished) == 3 and not (folder / "manifest.json").exists()
    assert find_prepared(data, vocab_size=300, tokenizer=None) is None
    (folder / "tokens" / "tmpleft").write_text("of a killed call")

    prepared = prepare(data, vocab_size=300, tokenizer=None, quiet=True)

    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    listed = {file.name for s in prepared.manifest.sources for side in (s.train, s.eval) for file in side.files}
    assert {f"tokens/{path.name}" for path in (folder / "tokens").iterdir()} == listed and len(listed) > 3
    in_one_go = prepare(
        data.model_copy(update={"prepared_dir": str(folder) + "-other"}), vocab_size=300, tokenizer=None, quiet=True
    )
    assert prepared.manifest.content_hash == in_one_go.manifest.content_hash


SLOW = """
import time, pathlib
write_prepared = p.write_prepared
def slowly(wanted, **keys):
    with open(wanted.folder.parent / "log", "a") as log:
        log.write("wrote\\n")
    time.sleep(1.5)
    write_prepared(wanted, **keys)
p.write_prepared = slowly
"""


def test_of_two_processes_one_prepares_and_the_other_waits(two_sources):
    data = two_sources()
    processes = [start(data, SLOW) for _ in range(2)]
    hashes = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(hashes) == 1
    assert (Path(os.environ["RELORA_CACHE"]) / "prepared" / "log").read_text() == "wrote\n"


def test_too_little_data_says_how_much_there_is(tmp_path, write, config, prepared_of):
    a = write(tmp_path / "a.jsonl", ["x"])
    b = write(tmp_path / "b.jsonl", ["some text that is long enough"] * 40)
    data = config(a, b, eval_fraction=1e-9)
    prepared = prepared_of(data)
    first, second = amount_problems(prepared, data)
    assert "data.sources[0]" in first and "2 training tokens, fewer than one row" in first
    assert "sequence_length = 32" in first and "lower sequence_length" in first
    assert "data.eval_fraction = 1e-09: 0 held-out tokens in 0 documents" in second and "raise eval_fraction" in second
    with pytest.raises(UserError):
        prepared.samples(data, 0)


def test_one_long_text_is_held_out_in_part(tmp_path, documents, write, config, prepared_of):
    """Held out by whole documents alone it would be all in or all out; the advice of the message works."""
    texts = "\n".join(documents(60))
    data = config(write(tmp_path / "book.txt", [texts]))
    (line,) = amount_problems(prepared_of(data), data)
    assert (
        "0 held-out tokens in 0 documents" in line
        and "cut long texts into documents (data.document_characters)" in line
    )
    data = data.model_copy(update={"document_characters": 200})
    prepared = prepared_of(data)
    assert not amount_problems(prepared, data)
    train, held_out = decoded(prepared)
    assert len(held_out) > 3 and max(map(len, train + held_out)) <= 200
    assert sum(map(len, train + held_out)) == len(texts) and all(section in texts for section in train + held_out)
    assert not any(is_held_out(section, 0.2) for section in train)
    assert prepared.manifest.sources[0].skipped_empty == 0


def test_a_tokenizer_trained_then_and_given_now_is_the_same(tmp_path, documents, write, config, prepared_of):
    """As an evaluation of a run gives the tokenizer that the run trained."""
    data = config(write(tmp_path / "a.jsonl", documents(30)), prepared_dir=str(tmp_path / "out"))
    first = prepared_of(data)
    assert prepare(data, vocab_size=300, tokenizer=str(first.folder / "tokenizer"), quiet=True) == first


def test_the_default_source_needs_nothing(config, prepared_of, monkeypatch):
    """A piece of the standard library, for speed."""
    few = StdlibSource(config("python-stdlib").sources[0]).files[:30]
    monkeypatch.setattr(StdlibSource, "files", few)
    began = time.monotonic()
    prepared = prepared_of(config("python-stdlib"))
    assert prepared.manifest.sources[0].train.tokens > 10_000 and time.monotonic() - began < 20
    assert prepared.manifest.made_from["sources"][0]["python"]
