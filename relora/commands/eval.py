"""`relora eval RUN_OR_MODEL`: held-out loss and perplexity."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from relora.commands.load_model import load, run_of
from relora.config import Config, UserError, raise_if_any
from relora.data import amount_problems, eval_batches, unigram_entropy
from relora.data import prepare as prepare_tokens
from relora.engines import Batch
from relora.model.model import token_losses
from relora.train.evaluate import perplexity, summed_losses


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over `num_tokens` held-out tokens, and their unigram entropy, in nats."""

    loss: float
    num_tokens: int
    unigram_entropy: float


def evaluate(run_or_model: str, config: Config | None) -> None:
    """Print the loss of a model on the held-out text of its run, or on that of `config`.

    Raises:
        UserError: as `held_out`.
    """
    found = held_out(run_or_model, config)
    print(
        f"held-out loss {found.loss:.4f} nats, perplexity {perplexity(found.loss):.2f}, over {found.num_tokens:,} "
        f"tokens (their unigram entropy is {found.unigram_entropy:.4f})"
    )


@torch.no_grad()
def held_out(run_or_model: str, config: Config | None = None) -> HeldOut:
    """The loss of a model on the held-out text of its run, or on that of `config`.

    Raises:
        UserError: the model belongs to no run and no configuration says what to evaluate on.
    """
    settings = config or run_of(run_or_model)
    if settings is None:
        raise UserError([f"{run_or_model}: belongs to no run; --config CONFIG.yaml says what to evaluate on"])
    model, tokenizer = load(run_or_model)
    data = prepare_tokens(
        settings.data,
        vocab_size=_vocab_size(model.config),
        tokenizer=(settings.data.tokenizer or settings.model.name_or_path)
        if config is None
        else tokenizer.name_or_path,
        trust_remote_code=settings.model.trust_remote_code,
    )
    raise_if_any(amount_problems(data, settings.data))
    batch_size = settings.training.per_device_eval_batch_size or settings.training.per_device_batch_size
    is_bf16 = settings.training.mixed_precision == "bf16"

    def losses(batch: Batch) -> Tensor:
        on_device = {key: values.to(model.device) for key, values in batch.items()}
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_bf16):
            return token_losses(model, on_device)

    loss, labels = summed_losses(losses, eval_batches(data, settings.data, batch_size=batch_size))
    return HeldOut(
        loss / labels, labels, unigram_entropy(data, settings.data, targets=lambda batch: batch["labels"][:, 1:])
    )


def _vocab_size(config: PretrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)
