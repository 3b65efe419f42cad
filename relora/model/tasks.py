"""Training tasks: the architecture of the model, the inputs, targets and loss of a batch, and the metrics.

`training.task` names one of `TASKS`, or a user's own subclass of `Task` as `module:attribute`. All that is
particular to causal language models, the shift of the labels above all, stands in `CausalLM`.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from relora.config import Config, UserError
from relora.data.batches import IGNORED_LABEL, Batch, Row, make_batch
from relora.method.registry import resolve
from relora.model.loss import summed_cross_entropy


class Task(ABC):
    """One kind of training objective. It holds no state: engines, evaluation and the forecast share one object.

    A subclass gives `auto_class`, `inputs`, `targets` and `make_batch`. The other methods fit whatever classifies:
    a model that returns logits (..., classes), and integer targets of the same leading shape.

    Attributes:
        auto_class: the class of transformers that builds the model, such as AutoModelForCausalLM.
        description: what `auto_class` builds, in an error message.
        writes_text: whether the model can continue a prompt; evaluations then show samples.
    """

    auto_class: ClassVar[Any]
    description: ClassVar[str]
    writes_text: ClassVar[bool] = False

    @abstractmethod
    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The keyword arguments of `model.forward`, on the device of the batch."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """The class to predict at each position of the logits, int64; IGNORED_LABEL where nothing is predicted.

        Evaluation and `unigram_entropy` count exactly these.
        """

    @abstractmethod
    def make_batch(self, rows: Sequence[Row], sequence_length: int, *, eos_id: int, document_mask: bool) -> Batch:
        """Rows of tokens -> the batch that `inputs` and `targets` read, on the CPU.

        Args:
            rows: each at most `sequence_length` tokens, and empty where a batch is filled up.
            document_mask: whether attention stops at the documents of a row.
        """

    def num_labels(self, batch: Batch) -> int:
        """Number of predictions that the loss of `batch` sums over. Reads values: call it before the batch moves."""
        return int((self.targets(batch) != IGNORED_LABEL).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the targets of a batch, in nats.

        Returns:
            A scalar in float32, or float64 for logits in float64.
        """
        logits = model(**self.inputs(batch)).logits
        return summed_cross_entropy(logits.flatten(0, -2), self.targets(batch).flatten())

    def metrics(self, loss: float) -> dict[str, float]:
        """The fields of an evaluation's line of metrics.

        Args:
            loss: the mean per label on held-out data, in nats.

        Returns:
            `eval_loss` first, which makes the line one of an evaluation; others begin with `eval_` too.
        """
        return {"eval_loss": loss}

    def problems(self, model: PreTrainedModel, config: Config) -> list[str]:  # noqa: ARG002
        """One line for each setting that does not fit the model, found without computing. None by default.

        Args:
            model: the plain model, which may be a skeleton without values.
            config: the settings of the run.
        """
        return []

    def leaks(self, model: nn.Module, vocab_size: int, *, document_mask: bool) -> list[str]:  # noqa: ARG002
        """One line for each way in which the inputs give the targets away, found by computing. None by default.

        Args:
            vocab_size: number of token ids that `model` takes.
            document_mask: whether attention must stop at the documents of a row.
        """
        return []


class CausalLM(Task):
    """Predict each token from those before it.

    Batches are those of `relora.data.batches.make_batch`: input_ids and labels (rows, sequence), labels unshifted as in
    transformers; position_ids where the documents of a row are masked from each other.
    """

    auto_class = AutoModelForCausalLM
    description = "causal language model"
    writes_text = True

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}

    def targets(self, batch: Batch) -> Tensor:
        """The labels, shifted to where they are predicted: [a, b, c] -> [b, c, ignored].

        The labels are shifted, not the logits, which would be copied.
        """
        return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)

    make_batch = staticmethod(make_batch)

    def metrics(self, loss: float) -> dict[str, float]:
        """Loss in nats, and exp(loss), infinite where that overflows."""
        return {"eval_loss": loss, "eval_perplexity": math.exp(loss) if loss < 700 else math.inf}

    def problems(self, model: PreTrainedModel, config: Config) -> list[str]:
        problems, length = [], config.data.sequence_length
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            problems.append(f"data.sequence_length = {length}: the model has max_position_embeddings = {limit}")
        can_mask = _takes_positions(model) and not getattr(model.config, "alibi", False)
        if config.data.document_mask and not can_mask:
            problems.append(
                f"data.document_mask = true: {type(model).__name__} takes no position_ids, from which the mask is made"
            )
        return problems

    def leaks(self, model: nn.Module, vocab_size: int, *, document_mask: bool) -> list[str]:
        """Probe the attention mask on nine tokens: leakage from future tokens, or across packed documents."""
        problems, name = [], type(model).__name__
        ids = torch.randint(vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
        # The last token changes: no logits before it may.
        if _depends(model, ids, vocab_size, on=slice(8, 9), logits_at=slice(0, 8), positions=torch.arange(9)):
            problems.append(f"model: {name} sees the tokens that it is to predict: it is no causal language model")
        # Two documents of 4 and 5 tokens; the first one changes: the logits of the second may not.
        packed = torch.cat([torch.arange(4), torch.arange(5)])
        if document_mask and _depends(model, ids, vocab_size, on=slice(0, 4), logits_at=slice(4, 9), positions=packed):
            problems.append(
                f"data.document_mask = true: {name} lets attention through between documents whose positions restart; "
                "set it to false for this model"
            )
        return problems


TASKS: Mapping[str, type[Task]] = {"causal_lm": CausalLM}


def task_of(config: Config) -> Task:
    """The task of a run.

    Raises:
        UserError: `training.task` is unknown, cannot be imported, or is no subclass of `Task`.
    """
    name = config.training.task
    try:
        task: Any = resolve("training.task", name, TASKS)
    except ValueError as error:
        raise UserError([str(error)]) from None
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise UserError([f"training.task = {name}: must be a subclass of relora.model.tasks.Task"])
    return task()


@torch.no_grad()
def _depends(model: nn.Module, ids: Tensor, vocab_size: int, *, on: slice, logits_at: slice, positions: Tensor) -> bool:
    """Whether the logits at `logits_at` change with the tokens at `on`; ids (1, sequence), positions (sequence,)."""
    changed = ids.clone()
    changed[:, on] = (changed[:, on] + 1) % vocab_size
    was_training, device = model.training, next(model.parameters()).device
    more = {"position_ids": positions[None].to(device)} if _takes_positions(model) else {}
    model.eval()
    before, after = (model(input_ids=x.to(device), **more).logits[:, logits_at].float() for x in (ids, changed))
    model.train(was_training)
    return not torch.allclose(before, after, atol=1e-5)


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
