"""Sources -> tokenizer -> tokens on disk with a manifest."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from relora.config.input_sections import DataSection
from relora.data.cache_key import CacheKey, cache_key_of, folder_of
from relora.data.content import usable_cores
from relora.data.dataset import TOKENIZER_FOLDER, PreparedData, open_prepared
from relora.data.manifest import FORMAT_VERSION, MANIFEST, Manifest, SourceRecord, hash_of_json
from relora.data.mixture import Mixture
from relora.data.prepared_folder import UNFINISHED, complete, lock_of, read_unfinished, write_unfinished
from relora.data.sources import TEXT, Source, find_sources, load_sources
from relora.data.tokenize import (
    TOKENS_FOLDER,
    BeyondVocabularyError,
    Encoding,
    content_hash,
    num_pieces,
    remove_unreadable,
    write_stream,
)
from relora.data.tokenizer import (
    adds_bos,
    given_tokenizer,
    num_ids,
    read_tokenizer,
    remedy_of_vocabulary,
    tokenizer_hash,
    train_tokenizer,
    with_bos,
)
from relora.errors import UserError, disk_errors_name, raise_if_any
from relora.files import publish_folder, sha256_of, write_json

FEW_DOCUMENTS = 10
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """Everything that decides the tokens, checked, and the folder to write them to.

    Attributes:
        tokenizer: None: a byte-level BPE of `vocab_size` entries is trained.
    """

    data: DataSection
    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    key: CacheKey
    folder: Path


def prepare(
    data: DataSection,
    *,
    vocab_size: int,
    tokenizer: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> PreparedData:
    """The prepared data of this configuration, written now unless they exist. A killed preparation is resumed.

    DamagedError data are set aside by name and prepared again.

    Args:
        vocab_size: of the model.
        tokenizer: hub id or folder; None: train a byte-level BPE of vocab_size entries.
        revision: of the tokenizer's hub repository; None for its newest.

    Raises:
        UserError: all that is wrong with the sources and the tokenizer.
    """
    wanted = check_inputs(
        data, vocab_size=vocab_size, tokenizer=tokenizer, revision=revision, trust_remote_code=trust_remote_code
    )
    prepared = complete(wanted.folder, wanted.key, sets_aside=False)
    if prepared is None:
        with lock_of(wanted.folder, data.prepared_dir), progress_bars(shown=not quiet):
            prepared = complete(wanted.folder, wanted.key, sets_aside=True)  # another process may have been first
            if prepared is None:
                with disk_errors_name(wanted.folder):
                    write_prepared(wanted, quiet=quiet)
                prepared = open_prepared(wanted.folder)
    raise_if_any(vocabulary_problems(wanted, prepared))
    for remark in remarks(prepared, data) if not quiet else []:
        logger.warning(remark)
    return prepared


def find_prepared(
    data: DataSection,
    *,
    vocab_size: int,
    tokenizer: str | None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreparedData | None:
    """The prepared data if they exist already and are whole. Raises UserError as `prepare` does."""
    wanted = check_inputs(
        data, vocab_size=vocab_size, tokenizer=tokenizer, revision=revision, trust_remote_code=trust_remote_code
    )
    prepared = complete(wanted.folder, wanted.key, sets_aside=False)
    raise_if_any(vocabulary_problems(wanted, prepared) if prepared is not None else [])
    return prepared


def check_inputs(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, revision: str | None, trust_remote_code: bool
) -> Preparation:
    """The sources and the tokenizer, and where their tokens belong. Raises UserError with all that is wrong."""
    sources, problems = find_sources(data)
    given, more = given_tokenizer(
        data, vocab_size=vocab_size, tokenizer=tokenizer, revision=revision, trust_remote_code=trust_remote_code
    )
    raise_if_any([*problems, *more])
    key = cache_key_of(data, sources, given, vocab_size)
    return Preparation(data, sources, given, vocab_size, key, folder_of(data, key))


def vocabulary_problems(wanted: Preparation, prepared: PreparedData) -> list[str]:
    """A line if these tokens, perhaps prepared for another model, hold an id that this one has no embedding for."""
    largest = prepared.manifest.largest_id
    if largest < wanted.vocab_size:
        return []
    remedy = remedy_of_vocabulary(largest + 1, wanted.vocab_size)
    return [f"prepared data in {prepared.folder}: hold the token id {largest}; {remedy}"]


def remarks(prepared: PreparedData, data: DataSection) -> list[str]:
    """What is no mistake, but what somebody who reads the results should know."""
    found = []
    documents = sum(record.documents for record in prepared.records("eval"))
    if 0 < documents < FEW_DOCUMENTS:  # without any, nothing can be trained
        found.append(
            f"only {documents} documents are held out, and the held-out loss is theirs alone; data.eval_fraction holds "
            "out more, data.document_characters cuts long texts into several documents"
        )
    mixture = Mixture.of(tuple(source.weight for source in data.sources))
    if mixture.bound > 1:
        found.append(
            f"the weights of data.sources have no common unit: the samples of a source may be off its share by "
            f"{mixture.bound:.2f} samples; weights that are multiples of one unit, such as 0.001, keep it under one"
        )
    return found


def write_prepared(wanted: Preparation, *, quiet: bool) -> None:
    """Write the tokenizer, the tokens of every source, and last the manifest. Finished files are reused."""
    folder, data = wanted.folder, wanted.data
    num_proc = data.num_proc or usable_cores()
    sources = load_sources(wanted.sources, data.text_field, num_proc)
    pieces = pieces_of(wanted, sources, num_proc)
    remove_unreadable(folder)
    tokenizer = wanted.tokenizer or trained_tokenizer(wanted, sources, quiet=quiet)
    tokenizer = with_bos(tokenizer, add_bos=adds_bos(data, tokenizer))
    save_tokenizer(tokenizer, folder)
    encoding = Encoding.of(tokenizer, data, wanted.vocab_size)
    records = tuple(
        write_source(wanted, number, source, encoding, num_pieces=pieces[number])
        for number, source in enumerate(sources)
    )
    remove_leftovers(folder, records)
    write_json(folder / MANIFEST, manifest_of(wanted, tokenizer, encoding, records).model_dump(mode="json"))
    (folder / UNFINISHED).unlink()


def pieces_of(wanted: Preparation, sources: list[Dataset], num_proc: int) -> list[int]:
    """The number of pieces of each source, recorded so that a resumed preparation finds the finished ones."""
    begun = read_unfinished(wanted.folder)
    if begun is None:
        pieces = [num_pieces(source, num_proc) for source in sources]
        begun = write_unfinished(wanted.folder, wanted.key, pieces)
    return list(begun["num_pieces"])


def trained_tokenizer(wanted: Preparation, sources: list[Dataset], *, quiet: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of an earlier, killed preparation, or one trained now."""
    saved = wanted.folder / TOKENIZER_FOLDER
    if saved.exists():
        tokenizer, _ = read_tokenizer(str(saved), key="data.tokenizer")
        if tokenizer is not None:
            return tokenizer
    data = wanted.data
    return train_tokenizer(
        sources,
        vocab_size=wanted.vocab_size,
        eval_fraction=data.eval_fraction,
        document_characters=data.document_characters,
        quiet=quiet,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's folder in one step, unless it is there already."""
    saved, draft = folder / TOKENIZER_FOLDER, folder / f"{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer.save_pretrained(str(draft))
    if saved.exists():
        same = {path.name: sha256_of(path) for path in draft.iterdir()}
        if same == {path.name: sha256_of(path) for path in saved.iterdir() if path.is_file()}:
            shutil.rmtree(draft)
            return
    publish_folder(draft, saved)


def write_source(
    wanted: Preparation, number: int, source: Dataset, encoding: Encoding, *, num_pieces: int
) -> SourceRecord:
    """Both sides of one source, in the files tokens/NN-train-*.arrow and NN-eval-*.arrow."""
    section = wanted.data.sources[number]
    place = f"data.sources[{number}].path = {section.path!r}"
    try:
        sides = {
            side: write_stream(
                source,
                wanted.folder,
                encoding,
                name=f"{number:02d}-{side}",
                held_out=side == "eval",
                num_pieces=num_pieces,
                num_proc=wanted.data.num_proc,
                title=f"{section.path}, {side}",
            )
            for side in ("train", "eval")
        }
    except BeyondVocabularyError as error:
        remedy = remedy_of_vocabulary(num_ids(encoding.encoder.tokenizer), wanted.vocab_size)
        raise UserError([f"{place}: {error}; {remedy}"]) from error
    except UnicodeError as error:
        raise UserError([f"{place}: a text is not UTF-8 ({error})"]) from error
    texts = source.data.column(TEXT)
    nulls, empty = texts.null_count, pc.sum(pc.equal(pc.binary_length(texts), 0)).as_py() or 0
    if nulls:
        logger.warning("data.sources[%d] (%s): skipped %d rows without a text", number, section.path, nulls)
    return SourceRecord(spec=section.model_dump(exclude={"weight"}), **sides, skipped_nulls=nulls, skipped_empty=empty)


def manifest_of(
    wanted: Preparation,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    records: tuple[SourceRecord, ...],
) -> Manifest:
    """The manifest of the files that `records` describe."""
    hashed, largest_id = content_hash(wanted.folder, records)
    saved = wanted.folder / TOKENIZER_FOLDER
    content = {
        "format_version": FORMAT_VERSION,
        "content_hash": hashed,
        "made_from": wanted.key,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "tokenizer_files": {path.name: sha256_of(path) for path in sorted(saved.iterdir())},
        "vocab_size": num_ids(tokenizer),
        "largest_id": largest_id,
        "token_dtype": encoding.dtype,
        "eos_token_id": encoding.eos_id,
        "sources": [record.model_dump(mode="json") for record in records],
    }
    return Manifest.model_validate({**content, "hash": hash_of_json(content)})


def remove_leftovers(folder: Path, records: tuple[SourceRecord, ...]) -> None:
    """Delete files of killed preparations, and those without a document."""
    wanted = {file.name for record in records for side in (record.train, record.eval) for file in side.files}
    for path in (folder / TOKENS_FOLDER).iterdir():
        if f"{TOKENS_FOLDER}/{path.name}" not in wanted:
            path.unlink()


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Show or hide the bars of `datasets`, a setting of the process, which is restored afterwards."""
    hidden_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown and not hidden_before:
            datasets.enable_progress_bars()
