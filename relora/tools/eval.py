"""`relora eval RUN_OR_MODEL`: held-out loss and perplexity."""

import torch
from transformers import PretrainedConfig

from relora.config import Config, UserError, raise_if_any
from relora.data import check_amount, eval_batches, unigram_entropy
from relora.data import prepare as prepare_tokens
from relora.model import num_label_tokens, token_losses
from relora.runtime.evaluate import perplexity
from relora.tools.models import load, run_of


@torch.no_grad()
def evaluate(run_or_model: str, config: Config | None) -> None:
    """Print the loss of a model on the held-out text of its run, or on that of `config`.

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
    )
    raise_if_any(check_amount(data, settings.data))
    batch_size = settings.training.per_device_eval_batch_size or settings.training.per_device_batch_size
    loss, labels = 0.0, 0
    for batch in eval_batches(data, settings.data, batch_size=batch_size):
        on_device = {key: values.to(model.device) for key, values in batch.items()}
        loss += token_losses(model, on_device).double().item()
        labels += num_label_tokens(batch)
    entropy = unigram_entropy(data, settings.data)
    print(
        f"held-out loss {loss / labels:.4f} nats, perplexity {perplexity(loss / labels):.2f}, over {labels:,} tokens "
        f"(their unigram entropy is {entropy:.4f})"
    )


def _vocab_size(config: PretrainedConfig) -> int:
    return int(config.get_text_config().vocab_size)
