"""The tokenizer: a given one, or a byte-level BPE trained on the training documents."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relora.config.schema import DataSection
from relora.data.sources import TEXT, root_cause
from relora.data.split import document_pieces, is_held_out
from relora.files import missing_folder
from relora.hub import unreachable

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # the bytes and END_OF_TEXT
# By then the merges of a byte-level BPE no longer change; more text would only cost time and memory.
MAX_TRAINING_BYTES = 4 * 2**30


def given_tokenizer(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """The tokenizer that the configuration names, None if one is to be trained; and the problems.

    Args:
        vocab_size: of the model, which has an embedding for so many ids.
        tokenizer: hub id or folder, of `data.tokenizer` or else of the pretrained model.
    """
    if tokenizer is None:
        return None, training_problems(vocab_size)
    key = "model.name_or_path" if data.tokenizer is None else "data.tokenizer"
    given, problems = read_tokenizer(tokenizer, key=key, trust_remote_code=trust_remote_code)
    if given is not None and num_ids(given) > vocab_size:
        problems.append(
            f"{key} = {tokenizer!r}: the tokenizer has {num_ids(given)} entries, the model's vocabulary only "
            f"vocab_size = {vocab_size}"
        )
    return given, problems


def tokenizer_problems(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool = False
) -> list[str]:
    """Problems of the given tokenizer, or of the vocabulary size of the one to be trained."""
    return given_tokenizer(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)[1]


def read_tokenizer(
    name: str, *, key: str, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase | None, list[str]]:
    """A tokenizer from the hub or a folder, or None and why it cannot be used: it must be fast, and have an EOS.

    Args:
        key: the setting that names it, for the problems.
    """
    setting, missing = f"{key} = {name!r}", missing_folder(name)
    if missing is not None:
        return None, [f"{setting}: {missing}"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
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


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, which may exceed the number of entries."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that decides which ids a text becomes, and of the EOS."""
    content = json.loads(encoder_of(tokenizer).to_str())
    text = json.dumps([content, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the `tokenizers` object inside, with truncation and padding off."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def train_tokenizer(sources: Iterable[Dataset], *, vocab_size: int, eval_fraction: float, quiet: bool) -> Any:
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
    encoder.train_from_iterator(training_texts(list(sources), eval_fraction), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def training_texts(sources: list[Dataset], eval_fraction: float) -> Iterator[list[str]]:
    """The training documents in batches, thinned evenly where there are more than MAX_TRAINING_BYTES."""
    stride = -(-sum(source.data.nbytes for source in sources) // MAX_TRAINING_BYTES)
    for source in sources:
        documents = source.select(range(0, len(source), stride)) if stride > 1 else source
        for batch in documents.iter(batch_size=256):
            wanted = (text for text in batch[TEXT] if text and not is_held_out(text, eval_fraction))
            yield [piece for text in wanted for piece in document_pieces(text)]
