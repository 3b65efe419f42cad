"""Held-out loss: the sum of token losses over the label tokens, over all ranks."""

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from relora.engines import Batch, Engine, TrainState
from relora.model.model import num_label_tokens


def held_out_loss(live: TrainState, engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean loss per label token in nats, over the batches of all ranks together. Dropout is off.

    Args:
        batches: this rank's share, the same number of batches on every rank.
    """
    with engine.inference(live):
        sums = summed_losses(lambda batch: engine.token_losses(live, batch), batches)
    total, count = engine.world.sum(sums)
    return total / count


def summed_losses(token_losses: Callable[[Batch], Tensor], batches: Iterable[Batch]) -> tuple[float, int]:
    """Sum of the token losses over `batches`, in nats, and the number of their label tokens."""
    loss, labels = 0.0, 0
    for batch in batches:
        loss += token_losses(batch).double().item()
        labels += num_label_tokens(batch)
    return loss, labels


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
