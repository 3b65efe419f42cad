"""Documents -> Arrow files of token ids, written by `datasets`; their records and the hash of their content."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from relora.data.batches import TokenFile
from relora.data.manifest import FileRecord, SourceRecord, StreamRecord
from relora.data.sources import TEXT
from relora.data.split import document_pieces, is_held_out
from relora.data.tokenizer import encoder_of, num_ids
from relora.files import sync

INPUT_IDS = "input_ids"
TOKENS_FOLDER = "tokens"
# A killed preparation loses at most the pieces in progress, one per process: some minutes.
PIECE_BYTES = 256 * 2**20
BATCH_BYTES = 2 * 2**20
# With less text than this a further process takes longer to start than it saves.
MIN_BYTES_PER_PROCESS = 2**20


@dataclass(frozen=True)
class Encoding:
    """How documents become tokens."""

    encoder: Tokenizer
    eos_id: int
    dtype: str
    eval_fraction: float

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, eval_fraction: float) -> "Encoding":
        """The encoding of a tokenizer, its ids stored in the smallest unsigned integers that hold them."""
        dtype = "uint16" if num_ids(tokenizer) <= 2**16 else "uint32"
        return cls(encoder_of(tokenizer), tokenizer.eos_token_id, dtype, eval_fraction)


def encode_documents(
    table: pa.Table, *, encoder: Tokenizer, eos_id: int, dtype: str, eval_fraction: float, held_out: bool
) -> pa.Table:
    """The documents of one side of the split: a table of `input_ids` (list of `dtype`), one row per document."""
    texts = [text for text in table.column(TEXT).to_pylist() if text and is_held_out(text, eval_fraction) == held_out]
    return pa.table({INPUT_IDS: encode(texts, encoder, eos_id, np.dtype(dtype))})


def encode(texts: Sequence[str], encoder: Tokenizer, eos_id: int, dtype: np.dtype) -> pa.ListArray:
    """Token ids of each text, followed by EOS.

    Long texts are encoded in pieces, all of them in one call, and put together again.
    """
    pieces = [list(document_pieces(text)) for text in texts]
    flat = [piece for document in pieces for piece in document]
    encodings = iter(encoder.encode_batch_fast(flat, add_special_tokens=False))
    parts: list[np.ndarray] = []
    lengths = [0]
    for document in pieces:
        ids = [np.asarray(next(encodings).ids, dtype) for _ in document]
        parts += [*ids, np.asarray([eos_id], dtype)]
        lengths.append(sum(map(len, ids)) + 1)
    values = np.concatenate(parts) if parts else np.empty(0, dtype)
    return pa.ListArray.from_arrays(np.cumsum(lengths, dtype=np.int32), values)


def usable_cores() -> int:
    """The cores that this process may use, which the scheduler of a cluster may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
            fn_kwargs={**vars(encoding), "held_out": held_out},
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
        documents=file.num_documents,
        tokens=file.num_tokens,
    )


def content_hash(folder: Path, sources: Sequence[SourceRecord]) -> str:
    """sha256 of the tokens and of the documents' lengths, independent of how they are divided into files."""
    whole = hashlib.sha256()
    for source in sources:
        for stream in (source.train, source.eval):
            tokens, lengths = hashlib.sha256(), hashlib.sha256()
            for record in stream.files:
                file = TokenFile(folder / record.name)
                for values, offsets in zip(file.values, file.offsets, strict=True):
                    tokens.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
                    lengths.update(np.diff(offsets).astype("<u4").tobytes())
            whole.update(f"{stream.documents} {tokens.hexdigest()} {lengths.hexdigest()}\n".encode())
    return whole.hexdigest()
