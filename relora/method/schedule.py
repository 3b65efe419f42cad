"""The learning rate and the restarts, as pure functions of the step.

`step` is the number of updates applied so far, so the update that takes the run from `step` to `step + 1`
uses `lr_multiplier(step)`. There is no scheduler object and nothing to save: a resumed run asks again.
The shape is the jagged cosine of ReLoRA (arXiv 2307.05695, section 3): one global cosine, and after each
restart a linear climb back to it.
"""

import math
from typing import Literal

StageName = Literal["warm_start", "relora"]


def lr_multiplier(
    step: int,
    *,
    max_steps: int,
    warmup_steps: int,
    restart_every: int | None,
    restart_warmup_steps: int,
    min_lr_ratio: float,
    warm_start_steps: int = 0,
) -> float:
    """What the peak learning rate is multiplied by in the update from `step` to `step + 1`.

    Args:
        step: updates applied so far, >= 0.
        max_steps: length of the run in updates; past it the multiplier stays at `min_lr_ratio`.
        warmup_steps: linear warm-up at the start, 0 <= warmup_steps < max_steps.
        restart_every: updates between restarts; None for no restarts.
        restart_warmup_steps: linear re-warm-up after a restart and after the switch from the warm start.
        min_lr_ratio: the floor of the cosine, in [0, 1].
        warm_start_steps: full-rank updates before the first low-rank one.

    Raises:
        ValueError: a value is out of its range, or a restart would fall into the re-warm-up of the last.
    """
    _check(step, max_steps, warmup_steps, restart_every, restart_warmup_steps, min_lr_ratio, warm_start_steps)
    start = last_restart(step, max_steps=max_steps, restart_every=restart_every, warm_start_steps=warm_start_steps)
    if start is not None and step < start + restart_warmup_steps:
        summit = _base(start + restart_warmup_steps, max_steps, warmup_steps, min_lr_ratio)
        return summit * (step - start + 1) / restart_warmup_steps
    return _base(step, max_steps, warmup_steps, min_lr_ratio)


def last_restart(step: int, *, max_steps: int, restart_every: int | None, warm_start_steps: int) -> int | None:
    """The last step <= `step` at which the run restarted or switched from the warm start; None before both."""
    last = warm_start_steps if 0 < warm_start_steps <= step else None
    if restart_every is not None:
        reached = min(step, max_steps - 1) - warm_start_steps
        if reached >= restart_every:
            last = warm_start_steps + reached // restart_every * restart_every
    return last


def restarts_done(step: int, *, max_steps: int, restart_every: int | None, warm_start_steps: int = 0) -> int:
    """How many restarts a run has behind it at `step`, one that is due at `step` counted."""
    if restart_every is None:
        return 0
    return max(0, min(step, max_steps - 1) - warm_start_steps) // restart_every


def restart_due(step: int, *, max_steps: int, restart_every: int | None, warm_start_steps: int = 0) -> bool:
    """Whether a restart comes after update `step`: at warm_start_steps + k * restart_every, k >= 1, before the end."""
    if restart_every is None or step >= max_steps or step <= warm_start_steps:
        return False
    return (step - warm_start_steps) % restart_every == 0


def stage(step: int, *, warm_start_steps: int) -> StageName:
    """The stage that makes the next update. The switch at `warm_start_steps` belongs to the low-rank stage."""
    return "warm_start" if step < warm_start_steps else "relora"


def _base(step: int, max_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr_ratio
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def _check(
    step: int,
    max_steps: int,
    warmup_steps: int,
    restart_every: int | None,
    restart_warmup_steps: int,
    min_lr_ratio: float,
    warm_start_steps: int,
) -> None:
    rules = {
        f"step must be >= 0, not {step}": step >= 0,
        f"warmup_steps must be in [0, max_steps={max_steps}), not {warmup_steps}": 0 <= warmup_steps < max_steps,
        f"restart_warmup_steps must be >= 0, not {restart_warmup_steps}": restart_warmup_steps >= 0,
        f"min_lr_ratio must be in [0, 1], not {min_lr_ratio}": 0 <= min_lr_ratio <= 1,
        f"warm_start_steps must be >= 0, not {warm_start_steps}": warm_start_steps >= 0,
        f"restart_every must be >= 1 and >= restart_warmup_steps={restart_warmup_steps}, not {restart_every}": (
            restart_every is None or restart_every >= max(1, restart_warmup_steps)
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError("; ".join(broken))
