import json
import subprocess
import sys

import huggingface_hub
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from relora.config import check
from relora.config.derived import tokenizer_of
from relora.data import prepare
from relora.data.split import MAX_PIECE_CHARACTERS, document_pieces, is_held_out
from relora.data.tokenizer import read_tokenizer, tokenizer_hash, train_tokenizer


def trained(texts, vocab_size=400):
    source = Dataset.from_dict({"text": texts})
    return train_tokenizer([source], vocab_size=vocab_size, eval_fraction=0.01, quiet=True)


def test_trained_tokenizer_gives_texts_back(documents):
    tokenizer = trained(documents(100))
    assert tokenizer.vocab_size == 400
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    for text in [*documents(5, seed=9), " leading\r\n\ttabs  ", "emoji 🎉 \x00 \u200b", "ﬁ e\u0301"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_is_deterministic_across_processes(documents):
    code = (
        "import sys, json; from datasets import Dataset; from relora.data.tokenizer import *;"
        "s = Dataset.from_dict({'text': json.load(sys.stdin)});"
        "print(tokenizer_hash(train_tokenizer([s], vocab_size=400, eval_fraction=0.01, quiet=True)))"
    )
    texts = documents(100)
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenizer_hash(trained(texts))


def test_held_out_documents_do_not_train_it(documents):
    texts = documents(200)
    held_out = [text for text in texts if is_held_out(text, 0.5)]
    kept = [text for text in texts if not is_held_out(text, 0.5)]
    hashes = {
        tokenizer_hash(train_tokenizer([Dataset.from_dict({"text": t})], vocab_size=400, eval_fraction=0.5, quiet=True))
        for t in (texts, kept)
    }
    assert held_out and len(hashes) == 1


def test_very_long_documents_are_cut_and_lose_nothing(documents):
    line = documents(1)[0].replace("\n", " ") + "\n"
    text = line * (3 * MAX_PIECE_CHARACTERS // len(line))
    pieces = list(document_pieces(text))
    assert "".join(pieces) == text and len(pieces) == 3 + (len(text) > 3 * MAX_PIECE_CHARACTERS)
    assert all(piece.startswith("\n") for piece in pieces[1:])
    assert "".join(document_pieces("x" * 2_500_000)) == "x" * 2_500_000
    assert list(document_pieces("short")) == ["short"]


def test_given_tokenizer_is_kept(tmp_path, documents, write, config):
    given = tmp_path / "tok"
    trained(documents(100)).save_pretrained(given)
    data = config(write(tmp_path / "a.jsonl", documents(30)))
    prepared = prepare(data, vocab_size=1000, tokenizer=str(given), quiet=True)
    assert prepared.manifest.vocab_size == 400
    assert (
        prepared.tokenizer()("the rank")["input_ids"]
        == read_tokenizer(str(given), key="data.tokenizer")[0]("the rank")["input_ids"]
    )


def test_truncation_and_padding_of_a_tokenizer_are_not_used(tmp_path, documents, write, config):
    tokenizer = trained(documents(100))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    tokenizer.save_pretrained(tmp_path / "tok")
    text = " ".join(documents(3))
    data = config(write(tmp_path / "a.jsonl", [text]), eval_fraction=1e-9)
    prepared = prepare(data, vocab_size=400, tokenizer=str(tmp_path / "tok"), quiet=True)
    tokens = prepared.streams("train", 10**6)[0].row(0).tokens
    assert prepared.tokenizer().decode(tokens) == text + "<|endoftext|>"


def test_tokenizers_that_cannot_serve(tmp_path):
    (tmp_path / "nothing").mkdir()
    no_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    no_eos.save_pretrained(tmp_path / "no_eos")
    for name, words in (("nothing", "cannot be loaded"), ("no_eos", "no eos_token")):
        tokenizer, (problem,) = read_tokenizer(str(tmp_path / name), key="data.tokenizer")
        assert tokenizer is None
        assert words in problem and f"data.tokenizer = {str(tmp_path / name)!r}" in problem


def test_the_tokenizer_of_a_model_is_that_of_its_revision(tmp_path, documents, write, config, monkeypatch):
    # A cache of the hub with two commits, as its client lays it out; the client is offline in all tests.
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, commit, count in (("main", "a" * 40, 100), ("v1", "b" * 40, 30)):
        trained(documents(count)).save_pretrained(repository / "snapshots" / commit)
        (repository / "snapshots" / commit / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    data = config(write(tmp_path / "a.jsonl", documents(30)))
    model = {"name_or_path": "acme/tiny", "revision": "v1"}
    run = check({"output_dir": "x", "model": model, "data": data.model_dump()})
    prepared = prepare(data, vocab_size=1000, quiet=True, **tokenizer_of(run))
    of_commits = [read_tokenizer("acme/tiny", key="", revision=name)[0] for name in ("v1", None)]
    assert tokenizer_hash(of_commits[0]) != tokenizer_hash(of_commits[1])
    assert tokenizer_hash(prepared.tokenizer()) == tokenizer_hash(of_commits[0])
    # A tokenizer of its own has nothing to do with the revision of the model.
    own = check({"output_dir": "x", "model": model, "data": data.model_dump() | {"tokenizer": "acme/tiny"}})
    assert tokenizer_of(own)["revision"] is None
