"""The tokenizer: a given one, or a byte-level BPE trained on the training documents."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relora.config.input_sections import DataSection
from relora.data.encoder import encoder_content
from relora.data.sources import TEXT, root_cause
from relora.data.split import document_pieces, documents_of, is_held_out
from relora.errors import UserError
from relora.files import is_lfs_pointer, missing_folder
from relora.hub import unreachable

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # the bytes and END_OF_TEXT
# By then the merges of a byte-level BPE no longer change; more text would only cost time and memory.
MAX_TRAINING_BYTES = 4 * 2**30


def given_tokenizer(
    data: DataSection,
    *,
    vocab_size: int,
    tokenizer: str | None,
    revision: str | None = None,
    trust_remote_code: bool,
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """The tokenizer that the configuration names, None if one is to be trained; and the problems.

    Args:
        vocab_size: of the model, which has an embedding for so many ids.
        tokenizer: hub id or folder, of `data.tokenizer` or else of the pretrained model.
        revision: of the hub repository; None for its newest.
    """
    if tokenizer is None:
        return None, training_problems(vocab_size)
    key = "model.name_or_path" if data.tokenizer is None else "data.tokenizer"
    given, problems = read_tokenizer(tokenizer, key=key, revision=revision, trust_remote_code=trust_remote_code)
    if given is None:
        return None, problems
    if data.add_bos is True and given.bos_token_id is None:
        problems.append(f"data.add_bos = true: {key} = {tokenizer!r} has no bos_token")
    # Whether text becomes an id beyond the model's is seen when it is encoded; these two every document has.
    for name, token, number in (
        ("eos_token", given.eos_token, given.eos_token_id),
        ("bos_token", given.bos_token, given.bos_token_id if adds_bos(data, given) else None),
    ):
        if number is not None and number >= vocab_size:
            remedy = remedy_of_vocabulary(num_ids(given), vocab_size)
            problems.append(f"{key} = {tokenizer!r}: its {name} {token!r} has the id {number}; {remedy}")
    return given, problems


def remedy_of_vocabulary(needed: int, vocab_size: int) -> str:
    """What to do about a tokenizer with ids that the model has no embedding for."""
    return (
        f"the model has embeddings for the ids below vocab_size = {vocab_size}: raise model.config.vocab_size to "
        f"{needed}, or resize a pretrained model (resize_token_embeddings({needed}), save_pretrained)"
    )


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template of the tokenizer puts BOS before a text."""
    if tokenizer.bos_token_id is None:
        return False
    if not tokenizer.is_fast:
        return bool(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    found = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
    return bool(found.special_tokens_mask[:1] == [1] and found.ids[0] == tokenizer.bos_token_id)


def adds_bos(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every document begins with BOS: data.add_bos, auto as the tokenizer's template does."""
    return begins_with_bos(tokenizer) if data.add_bos == "auto" else bool(data.add_bos)


def with_bos(tokenizer: PreTrainedTokenizerBase, *, add_bos: bool) -> PreTrainedTokenizerBase:
    """The tokenizer with a template that agrees with the documents, so that a prompt begins as they do.

    Raises:
        UserError: it cannot be given such a template.
    """
    if begins_with_bos(tokenizer) != add_bos:
        tokenizer.add_bos_token = add_bos  # rebuilds the template
        if begins_with_bos(tokenizer) != add_bos:
            kind = type(tokenizer).__name__
            raise UserError([f"data.add_bos = {str(add_bos).lower()}: the template of this {kind} cannot be changed"])
    return tokenizer


def tokenizer_problems(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool = False
) -> list[str]:
    """Problems of the given tokenizer, or of the vocabulary size of the one to be trained."""
    return given_tokenizer(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)[1]


def read_tokenizer(
    name: str, *, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """A tokenizer from the hub or a folder, or None and why it cannot be used: it must be fast, and have an EOS.

    Args:
        key: the setting that names it, for the problems.
    """
    setting, missing = f"{key} = {name!r}", missing_folder(name)
    if missing is not None:
        return None, [f"{setting}: {missing}"]
    if is_lfs_pointer(Path(name) / "tokenizer.json"):
        return None, [f"{setting}: tokenizer.json is a pointer of Git LFS, not the content; run `git lfs pull` there"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a tokenizer's own code may raise anything
        reason = unreachable(error) or root_cause(error)
        if "trust_remote_code" in str(error):
            reason = (
                "it comes with code of its own, which is run only with model.trust_remote_code = true; read it first"
            )
        return None, [f"{setting}: cannot be loaded as a tokenizer: {reason}"]
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        return None, [f"{setting}: a fast tokenizer (tokenizer.json) is required, this is {kind}"]
    if tokenizer.eos_token_id is None:
        return None, [f"{setting}: has no eos_token, which must end every document"]
    return tokenizer, []


def training_problems(vocab_size: int) -> list[str]:
    """Why no tokenizer of this size can be trained."""
    if vocab_size >= SMALLEST_VOCABULARY:
        return []
    return [
        f"model.config.vocab_size = {vocab_size}: a byte-level BPE needs at least {SMALLEST_VOCABULARY} "
        "(data.tokenizer is null)"
    ]


def num_ids(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> int:
    """One more than the largest id, which may exceed the number of entries."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes, and of the EOS."""
    content = json.loads(encoder_content(tokenizer))
    text = json.dumps([content, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(
    sources: Iterable[Dataset],
    *,
    vocab_size: int,
    eval_fraction: float,
    quiet: bool,
    document_characters: int | None = None,
) -> Any:
    """A byte-level BPE as in GPT-2, trained deterministically on the documents that are not held out."""
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=not quiet,
    )
    encoder.train_from_iterator(training_texts(list(sources), eval_fraction, document_characters), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def training_texts(
    sources: list[Dataset], eval_fraction: float, document_characters: int | None
) -> Iterator[list[str]]:
    """The training documents in batches, thinned evenly where there are more than MAX_TRAINING_BYTES."""
    stride = -(-sum(source.data.nbytes for source in sources) // MAX_TRAINING_BYTES)
    for source in sources:
        documents = source.select(range(0, len(source), stride)) if stride > 1 else source
        for batch in documents.iter(batch_size=256):
            texts = documents_of(batch[TEXT], document_characters)
            wanted = (text for text in texts if not is_held_out(text, eval_fraction))
            yield [piece for text in wanted for piece in document_pieces(text)]
