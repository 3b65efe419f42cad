"""Sample text from a model."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
) -> str:
    """Continue `prompt` by up to `max_new_tokens`; greedily at temperature 0, else drawn from `seed`.

    The text never exceeds the positions of the model: a longer prompt loses its beginning, and generation stops there.

    Args:
        eos_ids: the tokens that end it; None for the EOS of the tokenizer.
    """
    ids: Any = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if ids.shape[1] == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]], device=model.device)
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
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    written: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    model.train(was_training)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
