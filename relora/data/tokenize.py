"""Documents -> Arrow files of token ids, written by `datasets`; their records and the hash of their content."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from relora.config.input_sections import DataSection
from relora.data.batches import TokenFile
from relora.data.content import usable_cores
from relora.data.encoder import TextEncoder, encoder_content
from relora.data.manifest import FileRecord, SourceRecord, StreamRecord
from relora.data.sources import TEXT
from relora.data.split import document_pieces, documents_of, is_held_out
from relora.data.tokenizer import begins_with_bos, num_ids
from relora.files import sha256_of, sync

INPUT_IDS = "input_ids"
TOKENS_FOLDER = "tokens"
# A killed preparation loses at most the pieces in progress, one per process: some minutes.
PIECE_BYTES = 256 * 2**20
BATCH_BYTES = 2 * 2**20
# With less text than this a further process takes longer to start than it saves.
MIN_BYTES_PER_PROCESS = 2**20
logger = logging.getLogger(__name__)


class BeyondVocabularyError(ValueError):
    """A text became a token id that the model has no embedding for."""


@dataclass(frozen=True)
class Encoding:
    """How texts become documents of tokens.

    Attributes:
        bos_id: begins every document; None: none does.
        eos_id: ends every document.
        dtype: the smallest unsigned integers that hold the ids.
        vocab_size: of the model; every id must be below.
        document_characters: longer texts are cut into documents of at most so many; None: none is.
    """

    encoder: TextEncoder
    bos_id: int | None
    eos_id: int
    dtype: str
    vocab_size: int
    eval_fraction: float
    document_characters: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: DataSection, vocab_size: int) -> "Encoding":
        """The encoding of a tokenizer whose template agrees with data.add_bos."""
        return cls(
            TextEncoder(encoder_content(tokenizer)),
            tokenizer.bos_token_id if begins_with_bos(tokenizer) else None,
            tokenizer.eos_token_id,
            "uint16" if num_ids(tokenizer) <= 2**16 else "uint32",
            vocab_size,
            data.eval_fraction,
            data.document_characters,
        )


def encode_documents(table: pa.Table, *, encoding: Encoding, held_out: bool) -> pa.Table:
    """The documents of one side of the split: a table of `input_ids` (list of the dtype), one row per document."""
    documents = documents_of(table.column(TEXT).to_pylist(), encoding.document_characters)
    fraction = encoding.eval_fraction
    return pa.table(
        {INPUT_IDS: encode([text for text in documents if is_held_out(text, fraction) == held_out], encoding)}
    )


def encode(texts: Sequence[str], encoding: Encoding) -> pa.ListArray:
    """Token ids of each text, after BOS where documents have one, followed by EOS.

    Long texts are encoded in pieces, all of them in one call, and put together again. Raises BeyondVocabularyError.
    """
    pieces = [list(document_pieces(text)) for text in texts]
    encoded = iter(encoding.encoder.ids([piece for document in pieces for piece in document]))
    dtype = np.dtype(encoding.dtype)
    begin = np.asarray([] if encoding.bos_id is None else [encoding.bos_id], dtype)
    end = np.asarray([encoding.eos_id], dtype)
    parts: list[np.ndarray] = []
    lengths = [0]
    for document in pieces:
        ids = [begin, *(np.asarray(next(encoded), dtype) for _ in document), end]
        parts += ids
        lengths.append(sum(map(len, ids)))
    values = np.concatenate(parts) if parts else np.empty(0, dtype)
    if len(values) and values.max() >= encoding.vocab_size:
        number = int(values.max())
        token = encoding.encoder.tokenizer.id_to_token(number)
        raise BeyondVocabularyError(f"text in it becomes the token {token!r} of id {number}")
    return pa.ListArray.from_arrays(np.cumsum(lengths, dtype=np.int32), values)


def num_pieces(source: Dataset, num_proc: int) -> int:
    """Pieces to write a source in: of PIECE_BYTES per process, at least one document each."""
    return max(1, min(len(source), -(-int(source.data.nbytes) // (PIECE_BYTES * num_proc))))


def write_stream(
    source: Dataset,
    folder: Path,
    encoding: Encoding,
    *,
    name: str,
    held_out: bool,
    num_pieces: int,
    num_proc: int | None,
    title: str,
) -> StreamRecord:
    """Write one side of a source to tokens/NAME-*.arrow, unless the files exist; returns their record."""
    paths: list[Path] = []
    for piece in range(num_pieces):
        part = source.shard(num_pieces, piece, contiguous=True)
        of_pieces = f" {piece + 1}/{num_pieces}" if num_pieces > 1 else ""
        path = folder / TOKENS_FOLDER / f"{name}-{piece:05d}.arrow"
        paths += write_piece(part, path, encoding, held_out=held_out, num_proc=num_proc, title=title + of_pieces)
    files = tuple(record for path in paths if (record := file_record(path)).documents)
    return StreamRecord(
        documents=sum(file.documents for file in files),
        tokens=sum(file.tokens for file in files),
        files=files,
    )


def write_piece(
    part: Dataset, path: Path, encoding: Encoding, *, held_out: bool, num_proc: int | None, title: str
) -> list[Path]:
    """Tokenize one piece with `Dataset.map` into `path`, or one file per process named after it; returns the files."""
    num_bytes = part.data.nbytes
    # As many processes as asked for, else as there are cores and work for; never more than documents.
    worthwhile = min(usable_cores(), -(-num_bytes // MIN_BYTES_PER_PROCESS))
    processes = max(1, min(num_proc or worthwhile, len(part)))
    with environment_of_workers():
        mapped = part.with_format("arrow").map(
            encode_documents,
            fn_kwargs={"encoding": encoding, "held_out": held_out},
            batched=True,
            batch_size=max(1, min(1000, BATCH_BYTES * len(part) // max(1, num_bytes))),
            remove_columns=[TEXT],
            features=Features({INPUT_IDS: List(Value(encoding.dtype))}),
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(path),
            load_from_cache_file=True,
            new_fingerprint=path.stem,
            desc=title,
        )
    return [Path(file["filename"]) for file in mapped.cache_files]


@contextmanager
def environment_of_workers() -> Iterator[None]:
    """Restore os.environ afterwards: `Dataset.map` leaves a copy in its place (datasets 5.2)."""
    environment = os.environ
    before = environment.get("TOKENIZERS_PARALLELISM")
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003  # the very object, not its content
        environment.pop("TOKENIZERS_PARALLELISM", None)
        if before is not None:
            environment["TOKENIZERS_PARALLELISM"] = before


def file_record(path: Path) -> FileRecord:
    """The record of a finished file, after it is flushed to disk."""
    sync(path)
    file = TokenFile(path)
    return FileRecord(
        name=f"{TOKENS_FOLDER}/{path.name}",
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        documents=file.num_documents,
        tokens=file.num_tokens,
    )


def content_hash(folder: Path, sources: Sequence[SourceRecord]) -> tuple[str, int]:
    """sha256 of the tokens and of the documents' lengths, independent of how they are divided into files.

    Returns:
        the hash, and the largest token id.
    """
    whole, largest = hashlib.sha256(), 0
    for source in sources:
        for stream in (source.train, source.eval):
            tokens, lengths = hashlib.sha256(), hashlib.sha256()
            for record in stream.files:
                file = TokenFile(folder / record.name)
                for values, offsets in zip(file.values, file.offsets, strict=True):
                    tokens.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
                    lengths.update(np.diff(offsets).astype("<u4").tobytes())
                    largest = max(largest, int(values.max(initial=0)))
            whole.update(f"{stream.documents} {tokens.hexdigest()} {lengths.hexdigest()}\n".encode())
    return whole.hexdigest(), largest


def remove_unreadable(folder: Path) -> None:
    """Delete the files that a power failure left unreadable, so that a resumed preparation writes them again."""
    for path in sorted((folder / TOKENS_FOLDER).glob("*.arrow")):
        try:
            TokenFile(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is written again", path, error)
            path.unlink()
