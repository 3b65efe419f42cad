"""Sources -> tokens on disk -> the batch at a position."""

from relora.data.batches import IGNORED_LABEL, Batch, Samples, make_batch, micro_batches
from relora.data.dataset import (
    PreparedData,
    amount_problems,
    eval_batches,
    open_prepared,
    unigram_entropy,
)
from relora.data.overlap import num_trained_on
from relora.data.prepare import find_prepared, prepare
from relora.data.sources import Source, problems
from relora.data.tokenizer import tokenizer_problems

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "PreparedData",
    "Samples",
    "Source",
    "amount_problems",
    "eval_batches",
    "find_prepared",
    "make_batch",
    "micro_batches",
    "num_trained_on",
    "open_prepared",
    "prepare",
    "problems",
    "tokenizer_problems",
    "unigram_entropy",
]
