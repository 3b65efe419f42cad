"""`relora generate RUN_OR_MODEL --prompt TEXT`: sample text."""

from relora.runtime.sample import sample_text
from relora.tools.models import load


def generate(run_or_model: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Print `prompt` and what the model makes of it."""
    model, tokenizer = load(run_or_model)
    text = sample_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    print(text)
