"""A batch of documents -> their token ids, as `Dataset.map` wants it. Runs in worker processes."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from relora.data.sources import TEXT
from relora.data.split import document_pieces, is_held_out

INPUT_IDS = "input_ids"


def encode_documents(
    table: pa.Table, *, encoder: Tokenizer, eos_id: int, dtype: str, eval_fraction: float, held_out: bool
) -> pa.Table:
    """The documents of one side of the split: a table of `input_ids` (list of `dtype`), one row a document."""
    texts = [text for text in table.column(TEXT).to_pylist() if text and is_held_out(text, eval_fraction) == held_out]
    return pa.table({INPUT_IDS: encode(texts, encoder, eos_id, np.dtype(dtype))})


def encode(texts: Sequence[str], encoder: Tokenizer, eos_id: int, dtype: np.dtype) -> pa.ListArray:
    """Token ids of each text, and EOS after it."""
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


def token_dtype(num_ids: int) -> str:
    """The smallest unsigned integer type that holds every id."""
    return "uint16" if num_ids <= 2**16 else "uint32"
