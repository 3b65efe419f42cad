"""`relora eval RUN_OR_MODEL`: loss and other metrics on held-out text."""

import logging
from dataclasses import dataclass

import torch

from relora.commands.load_model import load, run_of
from relora.config import Config, UserError, raise_if_any
from relora.config.derived import tokenizer_of
from relora.data import PreparedData, amount_problems, eval_batches, find_prepared, num_trained_on, unigram_entropy
from relora.data import prepare as prepare_tokens
from relora.model.model import vocab_size_of
from relora.model.tasks import task_of
from relora.train.evaluate import summed_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Results on held-out data.

    Attributes:
        loss: mean per label, in nats.
        num_tokens: number of labels.
        unigram_entropy: of the same labels, in nats: the loss of the best model that ignores all context.
        metrics: those of the task, `eval_loss` among them.
    """

    loss: float
    num_tokens: int
    unigram_entropy: float
    metrics: dict[str, float]


def evaluate(run_or_model: str, config: Config | None) -> None:
    """Print the metrics of a model on the held-out text of its run, or on that of `config`.

    Raises:
        UserError: as `held_out`.
    """
    found = held_out(run_or_model, config)
    others = {name.removeprefix("eval_"): value for name, value in found.metrics.items() if name != "eval_loss"}
    print(
        f"held-out loss {found.loss:.4f} nats{''.join(f', {name} {value:.2f}' for name, value in others.items())}, "
        f"over {found.num_tokens:,} tokens (their unigram entropy is {found.unigram_entropy:.4f})"
    )


@torch.no_grad()
def held_out(run_or_model: str, config: Config | None = None) -> HeldOut:
    """Evaluate a model on the held-out text of its run, or on that of `config`.

    Raises:
        UserError: the model belongs to no run and there is no config, the model or the data cannot be read, or the run
            was trained on some of the text.
    """
    run = run_of(run_or_model)
    settings = config or run
    if settings is None:
        raise UserError([f"{run_or_model}: belongs to no run; --config CONFIG.yaml says what to evaluate on"])
    task = task_of(settings)
    model, tokenizer = load(run_or_model, task, trust_remote_code=settings.model.trust_remote_code)
    # A model is evaluated on its own tokens, unless a config names others.
    named = {} if config is None or tokenizer_of(config)["tokenizer"] is None else tokenizer_of(config)
    own = {"tokenizer": tokenizer.name_or_path, "trust_remote_code": settings.model.trust_remote_code}
    data = prepare_tokens(settings.data, vocab_size=vocab_size_of(model.config), **(own | named))
    if run is not None and config is not None:
        check_unseen(run, config, data, vocab_size_of(model.config))
    raise_if_any(amount_problems(data, settings.data))
    batch_size = settings.training.per_device_eval_batch_size or settings.training.per_device_batch_size
    batches = eval_batches(data, settings.data, batch_size=batch_size, make_batch=task.make_batch)
    device, is_bf16 = next(model.parameters()).device, settings.training.mixed_precision == "bf16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):  # the precision of training
        on_device = ({key: values.to(device) for key, values in batch.items()} for batch in batches)
        loss, labels = summed_losses(task, lambda batch: task.loss(model, batch), on_device)
    entropy = unigram_entropy(data, settings.data, targets=task.targets, make_batch=task.make_batch)
    return HeldOut(loss / labels, labels, entropy, task.metrics(loss / labels))


def check_unseen(run: Config, config: Config, data: PreparedData, vocab_size: int) -> None:
    """Raise UserError if the run was trained on text that `config` holds out, and warn if nobody can know.

    The hash of a document decides whether it is held out, so a smaller fraction holds out none that a larger one trains
    on, whatever the sources.
    """
    here, there = config.data, run.data
    if here.eval_fraction <= there.eval_fraction and here.document_characters == there.document_characters:
        return
    held_out = f"data.eval_fraction = {here.eval_fraction}"
    remedy = f"the run held out {there.eval_fraction}: set data.eval_fraction to {there.eval_fraction} or less"
    if here.document_characters != there.document_characters:
        remedy += f" and data.document_characters to {there.document_characters or 'null'}"
    try:
        trained = find_prepared(there, vocab_size=vocab_size, **tokenizer_of(run))
    except UserError:  # its sources are not on this machine, or have changed
        trained = None
    common = None if trained is None else num_trained_on(data, trained)
    if common:
        raise UserError([f"{held_out}: the run was trained on {common} of the documents that this holds out; {remedy}"])
    if common is None:
        logger.warning("%s: the run may have been trained on documents that this holds out; %s", held_out, remedy)
