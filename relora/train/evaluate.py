"""Held-out loss: the sum of token losses over the number of label tokens, of all processes together."""

from collections.abc import Callable, Iterable

from torch import Tensor

from relora.data import Batch
from relora.engines import Engine, TrainState
from relora.model.tasks import Task


class GivenUp(Exception):  # noqa: N818  # not an error
    """An evaluation was given up by all processes at the same batch, as one of them has been asked to stop."""


def held_out_loss(
    train_state: TrainState, engine: Engine, batches: Iterable[Batch], *, after_batch: Callable[[], None]
) -> float:
    """Mean loss per label token in nats, over the batches of all processes. Dropout is off.

    Args:
        batches: those of this process, equally many on every process.
        after_batch: called after each; it may raise `GivenUp`, on all processes or on none.
    """
    with engine.inference(train_state):
        sums = summed_losses(
            engine.task, lambda batch: engine.loss(train_state, batch), batches, after_batch=after_batch
        )
    total, count = engine.world.sum(sums)
    return total / count


def summed_losses(
    task: Task,
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    *,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Sum of the losses over `batches`, in nats, and the number of their labels.

    Args:
        loss_of: the sum of the losses of one batch, such as `Engine.loss`.
        after_batch: called after each batch.
    """
    loss, num_labels = 0.0, 0
    for batch in batches:
        loss += loss_of(batch).double().item()
        num_labels += task.num_labels(batch)
        after_batch()
    return loss, num_labels
