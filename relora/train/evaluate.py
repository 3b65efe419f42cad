"""Held-out loss: the sum of token losses over the number of label tokens, of all processes together."""

import math
from collections.abc import Callable, Iterable

from torch import Tensor

from relora.engines import Batch, Engine, TrainState
from relora.model.model import num_label_tokens


def held_out_loss(train_state: TrainState, engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean loss per label token in nats, over the batches of all processes. Dropout is off.

    Args:
        batches: those of this process, equally many on every process.
    """
    with engine.inference(train_state):
        sums = summed_losses(lambda batch: engine.token_losses(train_state, batch), batches)
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
