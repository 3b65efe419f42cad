"""`relora generate RUN_OR_MODEL --prompt TEXT`: sample text."""

import math

from relora.commands.load_model import load
from relora.config import raise_if_any
from relora.model.generate import sample_text


def generate(run_or_model: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print `prompt` and what the model makes of it.

    Raises:
        UserError: no model there, or a number that nothing can be sampled with.
    """
    rules = {
        f"--max-new-tokens {max_new_tokens}: must be >= 1": max_new_tokens >= 1,
        f"--temperature {temperature}: must be >= 0, and finite": 0 <= temperature < math.inf,
    }
    raise_if_any(rule for rule, holds in rules.items() if not holds)
    model, tokenizer = load(run_or_model)
    text = sample_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    print(text)
