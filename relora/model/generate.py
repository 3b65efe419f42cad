"""Sample text from a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from relora.data.tokenizer import begins_with_bos


@torch.no_grad()
def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_ids: int | list[int] | None = None,
    after_token: Callable[[], None] = lambda: None,
    together: bool = False,
) -> str:
    """Continue `prompt` by up to `max_new_tokens`; greedily at temperature 0, else drawn from `seed`.

    The text never exceeds the positions of the model: a longer prompt loses its beginning, and generation stops there.

    Args:
        eos_ids: the tokens that end it; None for the EOS of the tokenizer.
        after_token: called after each token; an error that it raises ends the sampling.
        together: every process calls this at once, and goes on with forward passes until all have finished. Where a
            forward pass gathers parameters, one that ended early would leave the others waiting.
    """
    # As a document of the training data begins, and not ended, as some templates end a text.
    begin = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    prompt_ids = begin + tokenizer(prompt, add_special_tokens=False).input_ids
    ids = torch.tensor([prompt_ids or [tokenizer.eos_token_id]], device=model.device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        ids = ids[:, -(limit - 1) :]
        max_new_tokens = min(max_new_tokens, limit - ids.shape[1])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id if eos_ids is None else eos_ids,
        use_cache=True,
    )

    def never(ids: Tensor, _: Any) -> Tensor:
        after_token()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    was_training, criteria = model.training, StoppingCriteriaList([never])
    model.eval()
    torch.manual_seed(seed)
    try:
        written: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=criteria,
            synced_gpus=together,
        )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
