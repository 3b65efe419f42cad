"""`relora generate RUN_OR_MODEL --prompt TEXT`: sample text."""

import math

from relora.commands.load_model import load
from relora.config import UserError, raise_if_any
from relora.model.generate import sample_text


def generate(
    run_or_model: str, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, trust_remote_code: bool
) -> None:
    """Print `prompt` and the model's continuation.

    Raises:
        UserError: there is no model, it writes no text, or a number is out of range.
    """
    problems = []
    if max_new_tokens < 1:
        problems.append(f"--max-new-tokens {max_new_tokens}: must be >= 1")
    if not 0 <= temperature < math.inf:
        problems.append(f"--temperature {temperature}: must be >= 0, and finite")
    raise_if_any(problems)
    model, tokenizer = load(run_or_model, trust_remote_code=trust_remote_code)
    if not model.can_generate():
        raise UserError([f"{run_or_model}: {type(model).__name__} is no model that continues a text"])
    text = sample_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        # Several tokens may end a text of a published model, its tokenizer names one of them.
        eos_ids=model.generation_config.eos_token_id,
    )
    print(text)
