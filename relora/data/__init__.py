"""Sources -> tokens on disk -> the batch at a position."""

from relora.data.batches import Batch, Samples, micro_batches
from relora.data.dataset import PreparedData, amount_problems, eval_batches, open_prepared, probe_batch, unigram_entropy
from relora.data.local_files import problems
from relora.data.prepare import find_prepared, prepare

__all__ = [
    "Batch",
    "PreparedData",
    "Samples",
    "amount_problems",
    "eval_batches",
    "find_prepared",
    "micro_batches",
    "open_prepared",
    "prepare",
    "probe_batch",
    "problems",
    "unigram_entropy",
]
