"""Text is encoded as text, whatever special tokens it spells, and BOS goes where the tokenizer's template puts it."""

import pickle

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from relora.data import find_prepared, prepare
from relora.data.encoder import TextEncoder, encoder_content
from relora.data.tokenizer import begins_with_bos
from relora.errors import UserError
from relora.model.generate import sample_text

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe(*, bos=False, eos_in_template=False, ignore_merges=False):
    """A byte-level BPE without merges: one token a byte, after <eos> and <bos>."""
    vocabulary = {token: number for number, token in enumerate(["<eos>", "<bos>", *LETTERS])}
    encoder = Tokenizer(models.BPE(vocabulary, [], ignore_merges=ignore_merges))
    # With ignore_merges whole words are looked up, which is how a model itself could find `<eos>`.
    encoder.pre_tokenizer = pre_tokenizers.Split(" ", "removed") if ignore_merges else pre_tokenizers.ByteLevel(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="<eos>", bos_token="<bos>")
    if bos or eos_in_template:
        single = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos_in_template else ''}"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 1), ("<eos>", 0)]
        )
    return tokenizer


def looked_up(model):
    encoder = Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=encoder, eos_token="</s>", unk_token="<unk>")


WORDS = {"<unk>": 0, "</s>": 1, "a": 2, "##</s>": 3}
PIECES = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("<", -2.0), ("/", -2.0), ("s", -2.0), (">", -2.0)]


@pytest.mark.parametrize(
    "tokenizer",
    [
        bpe(),
        bpe(ignore_merges=True),
        looked_up(models.Unigram(PIECES, 0, False)),
        looked_up(models.WordLevel(WORDS, unk_token="<unk>")),
        looked_up(models.WordPiece(WORDS, unk_token="<unk>")),
    ],
    ids=["BPE", "BPE, whole words", "Unigram", "WordLevel", "WordPiece"],
)
def test_no_text_becomes_a_special_token(tokenizer):
    eos, unknown = tokenizer.eos_token, tokenizer.unk_token_id
    encoder = TextEncoder(encoder_content(tokenizer))
    assert tokenizer.eos_token_id in tokenizer(f"a {eos} a").input_ids  # what a text must not do
    (ids,) = encoder.ids([f"a {eos} a{eos}"])
    assert not set(ids) & ({*tokenizer.all_special_ids} - {unknown}) and len(ids) >= 3
    # The same in the processes that prepare data, and the same as ever for ordinary text.
    assert pickle.loads(pickle.dumps(encoder)).ids([f"a {eos} a{eos}"]) == [ids]
    assert encoder.ids(["a a"]) == [tokenizer("a a", add_special_tokens=False).input_ids]


def test_added_tokens_that_are_not_special_are_still_tokens():
    tokenizer = bpe()
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    (ids,) = TextEncoder(encoder_content(tokenizer)).ids(["x    y"])
    assert ids == tokenizer("x    y").input_ids and len(ids) == 3


def documents_of(prepared):
    """The token ids of the training documents."""
    row = prepared.streams("train", 10**9)[0].row(0)
    ends = [*row.starts[1:], len(row.tokens)]
    return [row.tokens[start:end].tolist() for start, end in zip(row.starts, ends, strict=True)]


@pytest.fixture
def prepared_with(tmp_path, write, config):
    """Prepare "one" and "two<eos>" with a tokenizer; everything is trained on."""

    def run(tokenizer, vocab_size=300, **keys):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        data = config(write(tmp_path / "a.jsonl", ["one", "two<eos>"]), eval_fraction=1e-9, **keys)
        return data, prepare(data, vocab_size=vocab_size, tokenizer=str(tmp_path / "tokenizer"), quiet=True)

    return run


@pytest.mark.parametrize(
    ("template", "add_bos", "has_bos"),
    [
        (False, "auto", False),
        (True, "auto", True),
        (True, False, False),
        (False, True, True),
        (True, True, True),
    ],
)
def test_documents_begin_with_bos_as_prompts_do(prepared_with, template, add_bos, has_bos):
    _, prepared = prepared_with(bpe(bos=template), add_bos=add_bos)
    plain = bpe()
    begin = [1] if has_bos else []
    assert documents_of(prepared) == [
        [*begin, *plain(text, split_special_tokens=True).input_ids, 0] for text in ("one", "two<eos>")
    ]
    tokenizer = prepared.tokenizer()
    assert begins_with_bos(tokenizer) == has_bos
    assert tokenizer("one").input_ids == [*begin, *plain("one").input_ids]
    assert prepared.manifest.made_from.get("add_bos", False) == has_bos


def test_add_bos_that_changes_nothing_keeps_the_data(prepared_with, tmp_path):
    data, prepared = prepared_with(bpe())
    same = data.model_copy(update={"add_bos": False})
    assert find_prepared(same, vocab_size=300, tokenizer=str(tmp_path / "tokenizer")) == prepared
    other = data.model_copy(update={"add_bos": True})
    assert find_prepared(other, vocab_size=300, tokenizer=str(tmp_path / "tokenizer")) is None


def test_a_trained_tokenizer_takes_bos_too(tmp_path, documents, write, config):
    data = config(write(tmp_path / "a.jsonl", documents(20)), add_bos=True)
    prepared = prepare(data, vocab_size=300, tokenizer=None, quiet=True)
    bos = prepared.tokenizer().bos_token_id
    assert {document[0] for document in documents_of(prepared)} == {bos}
    assert prepared.tokenizer()("x").input_ids[0] == bos


def test_bos_without_a_bos_token(prepared_with):
    tokenizer = bpe()
    tokenizer.bos_token = None
    with pytest.raises(UserError, match=r"data.add_bos = true: .* has no bos_token"):
        prepared_with(tokenizer, add_bos=True)


class Recorder(LlamaForCausalLM):
    """Remembers the prompts that it was given."""

    def generate(self, ids, **keys):
        self.prompt = ids.tolist()
        return super().generate(ids, **keys)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("prompt", ["", "one"])
def test_a_sample_begins_as_a_document_and_is_not_ended(bos, prompt):
    torch.manual_seed(0)
    model = Recorder(
        LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    tokenizer = bpe(bos=bos, eos_in_template=True)
    sample_text(model, tokenizer, prompt, max_new_tokens=2, temperature=0, seed=0)
    letters = tokenizer(prompt, add_special_tokens=False).input_ids
    assert model.prompt == [([1] if bos else []) + letters or [0]]


def test_a_tokenizer_may_have_entries_that_no_text_becomes(prepared_with):
    """One more than the model, as some published models have it; what counts is what is used."""
    tokenizer = bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    _, prepared = prepared_with(tokenizer, vocab_size=len(tokenizer) - 1)
    assert prepared.manifest.largest_id < len(tokenizer) - 1 == prepared.manifest.vocab_size - 1


@pytest.mark.parametrize(("token", "problem"), [("one", "becomes the token 'one' of id 258"), (None, None)])
def test_an_id_beyond_the_model_is_refused_with_the_remedy(prepared_with, token, problem):
    tokenizer = bpe()
    if token is None:
        tokenizer.add_special_tokens({"eos_token": "<end>"})
        problem = "its eos_token '<end>' has the id 258"
    else:
        tokenizer.add_tokens([token])
    with pytest.raises(UserError) as caught:
        prepared_with(tokenizer, vocab_size=258)
    (line,) = caught.value.problems
    assert problem in line and "vocab_size = 258" in line and "resize_token_embeddings(259)" in line


def test_data_of_a_larger_model_are_refused(prepared_with, tmp_path):
    data, prepared = prepared_with(bpe(), vocab_size=300)
    with pytest.raises(UserError, match=f"hold the token id {prepared.manifest.largest_id}; the model has embeddings"):
        prepare(data, vocab_size=prepared.manifest.largest_id, tokenizer=str(tmp_path / "tokenizer"), quiet=True)
