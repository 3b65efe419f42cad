"""Sources -> tokens on disk -> the batch at a position."""

from relora.data.batches import Batch, Samples, micro_batches
from relora.data.dataset import PreparedData, check_amount, eval_batches, open_prepared, probe_batch, unigram_entropy
from relora.data.local_files import check_files
from relora.data.prepare import find_prepared, prepare

__all__ = [
    "Batch",
    "PreparedData",
    "Samples",
    "check_amount",
    "check_files",
    "eval_batches",
    "find_prepared",
    "micro_batches",
    "open_prepared",
    "prepare",
    "probe_batch",
    "unigram_entropy",
]
