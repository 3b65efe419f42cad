"""Sources -> tokenizer -> tokens on disk with a manifest."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relora.config.schema import DataSection
from relora.data.cache_key import CacheKey, cache_key_of, folder_of, key_problems
from relora.data.dataset import TOKENIZER_FOLDER, PreparedData, open_prepared
from relora.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    SourceRecord,
    read_json,
    read_manifest,
)
from relora.data.sources import TEXT, Source, find_sources, load_sources
from relora.data.tokenize import TOKENS_FOLDER, Encoding, content_hash, num_pieces, usable_cores, write_stream
from relora.data.tokenizer import given_tokenizer, num_ids, tokenizer_hash, train_tokenizer
from relora.errors import UserError, raise_if_any
from relora.files import sync, write_json

LOCK = ".lock"
UNFINISHED = "unfinished.json"
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
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> PreparedData:
    """The prepared data of this configuration, written now unless they exist. A killed preparation is resumed.

    Args:
        vocab_size: of the model.
        tokenizer: hub id or folder; None: train a byte-level BPE of vocab_size entries.

    Raises:
        UserError: all that is wrong with the sources and the tokenizer.
    """
    wanted = check_inputs(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    if not is_complete(wanted):
        with lock_of(wanted.folder, wanted.data.prepared_dir), progress_bars(shown=not quiet):
            if not is_complete(wanted):  # another process may have been first
                write_prepared(wanted, quiet=quiet)
    return open_prepared(wanted.folder)


def find_prepared(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool = False
) -> PreparedData | None:
    """The prepared data if they exist already; reads no sources. Raises UserError as `prepare` does."""
    wanted = check_inputs(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    return open_prepared(wanted.folder) if is_complete(wanted) else None


def check_inputs(data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool) -> Preparation:
    """The sources and the tokenizer, and where their tokens belong. Raises UserError with all that is wrong."""
    sources, problems = find_sources(data)
    given, more = given_tokenizer(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    raise_if_any([*problems, *more])
    key = cache_key_of(data, sources, given, vocab_size)
    return Preparation(data, sources, given, vocab_size, key, folder_of(data, key))


@contextmanager
def lock_of(folder: Path, prepared_dir: str | None) -> Iterator[None]:
    """Let one process at a time prepare a folder; the others wait here, and then find it complete.

    Args:
        prepared_dir: the setting, None where the folder is one of the cache.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process that is preparing %s", folder)
            lock.acquire()
    except OSError as error:
        cache = f"the cache {str(folder)!r} (data.prepared_dir or the variable RELORA_CACHE chooses another folder)"
        setting = cache if prepared_dir is None else f"data.prepared_dir = {str(folder)!r}"
        raise UserError([f"{setting}: not a folder to write to: {error}"]) from error
    try:
        yield
    finally:
        lock.release()


def is_complete(wanted: Preparation) -> bool:
    """Whether the folder holds these data. Raises UserError if it holds something else, finished or not."""
    folder = wanted.folder
    manifest = read_manifest(folder)
    if manifest is not None:
        raise_if_any(key_problems(folder, manifest.made_from, wanted.key))
        return True
    if (folder / UNFINISHED).exists():
        raise_if_any(key_problems(folder, read_unfinished(folder)["made_from"], wanted.key))
    elif folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(
            [f"data.prepared_dir = {str(folder)!r}: holds other files and no {MANIFEST}; choose an empty folder"]
        )
    return False


def write_prepared(wanted: Preparation, *, quiet: bool) -> None:
    """Write the tokenizer, the tokens of every source, and last the manifest. Finished files are reused."""
    folder, data = wanted.folder, wanted.data
    num_proc = data.num_proc or usable_cores()
    sources = load_sources(wanted.sources, data.text_field, num_proc)
    pieces = pieces_of(wanted, sources, num_proc)
    tokenizer = wanted.tokenizer or trained_tokenizer(wanted, sources, quiet=quiet)
    save_tokenizer(tokenizer, folder)
    encoding = Encoding.of(tokenizer, data.eval_fraction)
    records = tuple(
        write_source(wanted, number, source, encoding, num_pieces=pieces[number])
        for number, source in enumerate(sources)
    )
    remove_leftovers(folder, records)
    manifest = manifest_of(wanted, tokenizer, encoding, records)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    (folder / UNFINISHED).unlink()


def pieces_of(wanted: Preparation, sources: list[Dataset], num_proc: int) -> list[int]:
    """The number of pieces of each source, recorded so that a resumed preparation finds the finished ones."""
    path = wanted.folder / UNFINISHED
    if not path.exists():
        pieces = [num_pieces(source, num_proc) for source in sources]
        write_json(path, {"made_from": wanted.key, "num_pieces": pieces})
    return list(read_unfinished(wanted.folder)["num_pieces"])


def read_unfinished(folder: Path) -> dict[str, Any]:
    """The record of a preparation that was begun. Raises UserError if it is damaged."""
    content = read_json(folder / UNFINISHED)
    pieces = content.get("num_pieces") if isinstance(content, dict) else None
    are_counts = isinstance(pieces, list) and all(type(count) is int and 0 < count < 10**5 for count in pieces)
    if not (are_counts and isinstance(content.get("made_from"), dict)):
        raise UserError([f"{folder / UNFINISHED}: damaged; delete the folder"])
    return dict(content)


def trained_tokenizer(wanted: Preparation, sources: list[Dataset], *, quiet: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of an earlier, killed preparation, or one trained now."""
    saved = wanted.folder / TOKENIZER_FOLDER
    if saved.exists():
        return PreTrainedTokenizerFast.from_pretrained(str(saved))
    return train_tokenizer(sources, vocab_size=wanted.vocab_size, eval_fraction=wanted.data.eval_fraction, quiet=quiet)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer's folder atomically, unless it exists."""
    saved, draft = folder / TOKENIZER_FOLDER, folder / f"{TOKENIZER_FOLDER}.tmp"
    if saved.exists():
        return
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer.save_pretrained(str(draft))
    for path in draft.iterdir():
        sync(path)
    draft.replace(saved)


def write_source(
    wanted: Preparation, number: int, source: Dataset, encoding: Encoding, *, num_pieces: int
) -> SourceRecord:
    """Both sides of one source, in the files tokens/NN-train-*.arrow and NN-eval-*.arrow."""
    section = wanted.data.sources[number]
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
    nulls = source.data.column(TEXT).null_count
    empty = len(source) - nulls - sum(record.documents for record in sides.values())
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
    return Manifest.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "content_hash": content_hash(wanted.folder, records),
            "made_from": wanted.key,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "vocab_size": num_ids(tokenizer),
            "token_dtype": encoding.dtype,
            "eos_token_id": encoding.eos_id,
            "sources": records,
        }
    )


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
