"""The tokenizer: a given one, or a byte-level BPE trained on the training documents."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relora.data.sources import TEXT, root_cause
from relora.data.split import document_pieces, is_held_out
from relora.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # the bytes and END_OF_TEXT
# The merges of a byte-level BPE have long settled by then; more text only costs time and memory.
MOST_TRAINING_BYTES = 4 * 2**30


def load_tokenizer(name: str, *, key: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from the hub or a folder; `key` is the setting that names it.

    Raises:
        UserError: it cannot serve: it must be there, be fast, and have an EOS.
    """
    said, path = f"{key} = {name!r}", Path(name).expanduser()
    # What cannot be a hub id is not asked for over the network, which takes long where there is none.
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError([f"{said}: there is no such folder"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a tokenizer's own code may raise
        raise UserError([f"{said}: cannot be loaded as a tokenizer: {root_cause(error)}"]) from error
    if not tokenizer.is_fast:
        raise UserError([f"{said}: a fast tokenizer (tokenizer.json) is required, this is {type(tokenizer).__name__}"])
    if tokenizer.eos_token_id is None:
        raise UserError([f"{said}: has no eos_token, which must end every document"])
    return tokenizer


def check_vocabulary(key: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """A problem if the tokenizer can produce ids that the model has no embedding for."""
    entries = num_ids(tokenizer)
    if entries <= vocab_size:
        return []
    return [f"{key}: the tokenizer has {entries} entries, the model's vocabulary only vocab_size = {vocab_size}"]


def check_trainable(vocab_size: int) -> list[str]:
    if vocab_size >= SMALLEST_VOCABULARY:
        return []
    return [
        f"model.config.vocab_size = {vocab_size}: a byte-level BPE needs at least {SMALLEST_VOCABULARY} "
        "(data.tokenizer is null)"
    ]


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, which may exceed the number of entries."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides which ids a text becomes, and of the EOS."""
    content = json.loads(encoder_of(tokenizer).to_str())
    text = json.dumps([content, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the engine inside, that neither cuts nor pads documents."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def train_tokenizer(sources: Iterable[Dataset], *, vocab_size: int, eval_fraction: float, quiet: bool) -> Any:
    """A byte-level BPE as GPT-2's, the same for the same documents; the held-out ones are not looked at."""
    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=not quiet,
    )
    encoder.train_from_iterator(training_texts(list(sources), eval_fraction), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def training_texts(sources: list[Dataset], eval_fraction: float) -> Iterator[list[str]]:
    """The training documents in batches, thinned evenly where there are more than MOST_TRAINING_BYTES."""
    stride = -(-sum(source.data.nbytes for source in sources) // MOST_TRAINING_BYTES)
    for source in sources:
        documents = source.select(range(0, len(source), stride)) if stride > 1 else source
        for batch in documents.iter(batch_size=256):
            wanted = (text for text in batch[TEXT] if text and not is_held_out(text, eval_fraction))
            yield [piece for text in wanted for piece in document_pieces(text)]
