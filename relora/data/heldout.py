"""The held-out set: always the same rows, shared out among the ranks."""

from collections.abc import Iterator

import numpy as np

from relora.config.tree import DataSection
from relora.data.batches import NO_TOKENS, NOT_A_LABEL, Batch, make_batch
from relora.data.order import Mixture
from relora.data.prepared import PreparedData


def held_out_rows(prepared: PreparedData, data: DataSection) -> list[tuple[int, int]]:
    """(source, row) of every row to evaluate on: the first ones of each source, shares by weight.

    At most eval_tokens tokens in all, and at least one row; a source that has too few gives what it has.
    """
    available = [stream.num_rows for stream in prepared.streams("eval", data.sequence_length)]
    most = max(1, data.eval_tokens // data.sequence_length)
    quotas = Mixture.of([source.weight for source in data.sources]).counts(most)
    taken = [min(quota, rows) for quota, rows in zip(quotas, available, strict=True)]
    if not any(taken):
        taken[available.index(max(available))] = min(1, max(available))
    return [(source, row) for source, rows in enumerate(taken) for row in range(rows)]


def eval_batches(
    prepared: PreparedData, data: DataSection, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of the held-out rows, in batches [batch_size, sequence_length].

    The shares are disjoint and together the whole set. Every rank gets equally many batches, for a sharded model's
    forward is a collective; what is missing at the end is filled with rows without labels.
    """
    streams = prepared.streams("eval", data.sequence_length)
    places = held_out_rows(prepared, data)
    at_once = batch_size * world_size
    for first in range(rank * batch_size, -(-len(places) // at_once) * at_once, at_once):
        rows = [streams[source].row(row) for source, row in places[first : first + batch_size]]
        rows += [NO_TOKENS] * (batch_size - len(rows))
        yield make_batch(
            rows,
            data.sequence_length,
            eos_id=prepared.manifest.eos_token_id,
            document_mask=data.document_mask,
        )


def probe_batch(
    prepared: PreparedData, data: DataSection, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Batch:
    """One fixed batch: this rank's first of the held-out set."""
    return next(eval_batches(prepared, data, batch_size=batch_size, rank=rank, world_size=world_size))


def unigram_entropy(prepared: PreparedData, data: DataSection) -> float:
    """Nats: the loss on the held-out labels of the best model that ignores all context, fitted to those labels.

    Exactly the labels that are scored: labels[:, 1:] without NOT_A_LABEL. nan if there are none.
    """
    counts = np.zeros(prepared.manifest.vocab_size, dtype=np.int64)
    for batch in eval_batches(prepared, data, batch_size=16):
        labels = batch["labels"][:, 1:].numpy()
        counts += np.bincount(labels[labels != NOT_A_LABEL], minlength=len(counts))
    if not counts.any():
        return float("nan")
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
