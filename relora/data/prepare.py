"""Sources -> tokenizer -> tokens on disk with a manifest."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from relora.config.schema import DataSection
from relora.data.cache_key import Recipe, check_same, checked_tokenizer, folder_of, recipe_of
from relora.data.dataset import TOKENIZER_FOLDER, PreparedData, open_prepared
from relora.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    SourceRecord,
    read_json,
    read_manifest,
    write_manifest,
)
from relora.data.sources import TEXT, load_sources
from relora.data.tokenize import TOKENS_FOLDER, Encoding, content_hash, num_pieces, usable_cores, write_stream
from relora.data.tokenizer import num_ids, tokenizer_hash, train_tokenizer
from relora.errors import UserError
from relora.files import sync, write_json

LOCK = ".lock"
UNFINISHED = "unfinished.json"
logger = logging.getLogger(__name__)


def prepare(
    data: DataSection,
    *,
    vocab_size: int,
    tokenizer: str | None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> PreparedData:
    """The prepared data of this configuration, made now unless they are there. A killed call is taken up again.

    vocab_size: of the model; tokenizer: hub id or folder, None to train a byte-level BPE of vocab_size. Raises
    UserError.
    """
    given = checked_tokenizer(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    recipe = recipe_of(data, given, vocab_size)
    folder = folder_of(data, recipe)
    if not is_complete(folder, recipe):
        with lock_of(folder), progress_bars(shown=not quiet):
            if not is_complete(folder, recipe):  # another process may have been first
                write_prepared(folder, data, recipe, given, vocab_size=vocab_size, quiet=quiet)
    return open_prepared(folder)


def find_prepared(
    data: DataSection, *, vocab_size: int, tokenizer: str | None, trust_remote_code: bool = False
) -> PreparedData | None:
    """What `prepare` would return, if it is already there; reads no data. Raises UserError as `prepare` does."""
    given = checked_tokenizer(data, vocab_size=vocab_size, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    recipe = recipe_of(data, given, vocab_size)
    folder = folder_of(data, recipe)
    return open_prepared(folder) if is_complete(folder, recipe) else None


@contextmanager
def lock_of(folder: Path) -> Iterator[None]:
    """Only one process at a time prepares a folder; the others wait here, and then find it complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process that is preparing %s", folder)
            lock.acquire()
    except OSError as error:
        raise UserError([f"data.prepared_dir = {str(folder)!r}: not a folder to write to: {error}"]) from error
    try:
        yield
    finally:
        lock.release()


def is_complete(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds just this. Raises UserError if it holds something else, finished or not."""
    manifest = read_manifest(folder)
    if manifest is not None:
        check_same(folder, manifest.made_from, recipe)
        return True
    if (folder / UNFINISHED).exists():
        check_same(folder, read_json(folder / UNFINISHED)["made_from"], recipe)
    elif folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(
            [f"data.prepared_dir = {str(folder)!r}: holds other files and no {MANIFEST}; choose an empty folder"]
        )
    return False


def write_prepared(
    folder: Path,
    data: DataSection,
    recipe: Recipe,
    given: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    quiet: bool,
) -> None:
    num_proc = data.num_proc or usable_cores()
    sources = load_sources(data, num_proc)
    pieces = pieces_of(folder, recipe, sources, num_proc)
    tokenizer = given or trained_tokenizer(folder, data, sources, vocab_size=vocab_size, quiet=quiet)
    save_tokenizer(tokenizer, folder)
    encoding = Encoding.of(tokenizer, data.eval_fraction)
    records = tuple(
        write_source(folder, number, data, source, encoding, num_pieces=pieces[number])
        for number, source in enumerate(sources)
    )
    remove_leftovers(folder, records)
    write_manifest(folder, manifest_of(folder, recipe, tokenizer, encoding, records))
    (folder / UNFINISHED).unlink()


def pieces_of(folder: Path, recipe: Recipe, sources: list[Dataset], num_proc: int) -> list[int]:
    """In how many pieces each source is written; kept, so that a later call finds the finished ones."""
    path = folder / UNFINISHED
    if not path.exists():
        pieces = [num_pieces(source, num_proc) for source in sources]
        write_json(path, {"made_from": recipe, "num_pieces": pieces})
    return [int(pieces) for pieces in read_json(path)["num_pieces"]]


def trained_tokenizer(
    folder: Path, data: DataSection, sources: list[Dataset], *, vocab_size: int, quiet: bool
) -> PreTrainedTokenizerBase:
    """Trained now, unless an earlier call did."""
    saved = folder / TOKENIZER_FOLDER
    if saved.exists():
        return PreTrainedTokenizerFast.from_pretrained(str(saved))
    return train_tokenizer(sources, vocab_size=vocab_size, eval_fraction=data.eval_fraction, quiet=quiet)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    saved, unfinished = folder / TOKENIZER_FOLDER, folder / f"{TOKENIZER_FOLDER}.tmp"
    if saved.exists():
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(str(unfinished))
    for path in unfinished.iterdir():
        sync(path)
    unfinished.replace(saved)


def write_source(
    folder: Path, number: int, data: DataSection, source: Dataset, encoding: Encoding, *, num_pieces: int
) -> SourceRecord:
    """Both sides of one source, in the files tokens/NN-train-*.arrow and NN-eval-*.arrow."""
    spec = data.sources[number]
    sides = {
        side: write_stream(
            source,
            folder,
            encoding,
            name=f"{number:02d}-{side}",
            held_out=side == "eval",
            num_pieces=num_pieces,
            num_proc=data.num_proc,
            title=f"{spec.path}, {side}",
        )
        for side in ("train", "eval")
    }
    nulls = source.data.column(TEXT).null_count
    empty = len(source) - nulls - sum(record.documents for record in sides.values())
    if nulls:
        logger.warning("data.sources[%d] (%s): skipped %d rows without a text", number, spec.path, nulls)
    return SourceRecord(spec=spec.model_dump(exclude={"weight"}), **sides, skipped_nulls=nulls, skipped_empty=empty)


def manifest_of(
    folder: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    records: tuple[SourceRecord, ...],
) -> Manifest:
    return Manifest.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "content_hash": content_hash(folder, records),
            "made_from": recipe,
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "vocab_size": num_ids(tokenizer),
            "token_dtype": encoding.dtype,
            "eos_token_id": encoding.eos_id,
            "sources": records,
        }
    )


def remove_leftovers(folder: Path, records: tuple[SourceRecord, ...]) -> None:
    """Files of killed calls, and those without a document."""
    wanted = {file.name for record in records for side in (record.train, record.eval) for file in side.files}
    for path in (folder / TOKENS_FOLDER).iterdir():
        if f"{TOKENS_FOLDER}/{path.name}" not in wanted:
            path.unlink()


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """The bars of `datasets` are a setting of the process: set here, then as they were."""
    hidden_before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown and not hidden_before:
            datasets.enable_progress_bars()
