"""Held-out loss: the sum of token losses over the label tokens, over all ranks."""

import math
from collections.abc import Iterable

from relora.model import num_label_tokens
from relora.runtime.engines import Batch, Engine, Live


def held_out_loss(live: Live, engine: Engine, batches: Iterable[Batch]) -> float:
    """Mean loss per label token in nats, over the batches of all ranks together. Dropout is off.

    Args:
        batches: this rank's share. Ranks may have different numbers of batches.
    """
    was_training = live.model.training
    live.model.eval()
    loss, labels = 0.0, 0
    for batch in batches:
        loss += engine.token_losses(live, batch).double().item()
        labels += num_label_tokens(batch)
    live.model.train(was_training)
    total, count = engine.sum([loss, labels])
    return total / count


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
