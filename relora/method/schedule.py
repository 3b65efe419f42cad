"""The learning rate and the restarts, as pure functions of the step.

`step` is the number of batches consumed so far, so the update that takes the run from `step` to `step + 1` uses
`multiplier(step)`. There is no scheduler object and nothing to save: a resumed run asks again. The shape is the jagged
cosine of ReLoRA (arXiv 2307.05695, section 3): one global cosine, and after each restart a linear climb back to it.
"""

import math
from dataclasses import dataclass

from relora.method.choices import StageName


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate and the restarts of one run. All lengths are in updates.

    Attributes:
        max_steps: length of the run; past it the multiplier stays at `min_lr_ratio`.
        warmup_steps: linear warm-up at the start, 0 <= warmup_steps < max_steps.
        restart_every: distance of restarts; None for no restarts.
        restart_warmup_steps: linear re-warm-up after a restart and after the switch from the warm start.
        min_lr_ratio: the floor of the cosine, in [0, 1].
        warm_start_steps: full-rank updates before the first low-rank one.
        learning_rate: peak rate.
        warm_start_learning_rate: peak rate of the full-rank updates that come before low-rank ones; None for the same.
        restart_at_end: whether a restart that falls on `max_steps` takes place.

    Raises:
        ValueError: a value is out of its range, or a restart would fall into the re-warm-up of the last.
    """

    max_steps: int
    warmup_steps: int = 0
    restart_every: int | None = None
    restart_warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    warm_start_steps: int = 0
    learning_rate: float = 1.0
    warm_start_learning_rate: float | None = None
    restart_at_end: bool = False

    def __post_init__(self) -> None:
        warmup, rewarm, every = self.warmup_steps, self.restart_warmup_steps, self.restart_every
        rules = {
            f"warmup_steps must be in [0, max_steps={self.max_steps}), not {warmup}": 0 <= warmup < self.max_steps,
            f"restart_warmup_steps must be >= 0, not {rewarm}": rewarm >= 0,
            f"min_lr_ratio must be in [0, 1], not {self.min_lr_ratio}": 0 <= self.min_lr_ratio <= 1,
            f"warm_start_steps must be >= 0, not {self.warm_start_steps}": self.warm_start_steps >= 0,
            f"restart_every must be >= 1 and >= restart_warmup_steps={rewarm}, not {every}": (
                every is None or every >= max(1, rewarm)
            ),
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))

    def multiplier(self, step: int) -> float:
        """The factor on the peak learning rate in the update from `step` to `step + 1`; ValueError for step < 0."""
        if step < 0:
            raise ValueError(f"step must be >= 0, not {step}")
        start, climb = self.last_restart(step), self.restart_warmup_steps
        # After a restart a linear climb to where the cosine will be at its end.
        summit = step if start is None else max(step, start + climb)
        # Warm-up, one cosine over the whole run, and its floor.
        if summit < self.warmup_steps:
            height = (summit + 1) / self.warmup_steps
        elif summit >= self.max_steps:
            height = self.min_lr_ratio
        else:
            progress = (summit - self.warmup_steps) / (self.max_steps - self.warmup_steps)
            height = self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
        return height if summit == step else height * (climb + 1 - (summit - step)) / climb

    def rate(self, step: int, *, peak: float | None = None) -> float:
        """The learning rate of the update from `step` to `step + 1`.

        Args:
            peak: of parameters that have a peak rate of their own; None for that of the run.
        """
        in_warm_start = step < self.warm_start_steps < self.max_steps
        if peak is None:
            peak = self.warm_start_learning_rate if in_warm_start else None
        return self.multiplier(step) * (self.learning_rate if peak is None else peak)

    def restart_due(self, step: int) -> bool:
        """Whether a restart comes after update `step`: at warm_start_steps + k * restart_every, k >= 1."""
        return self.restarts_done(step) > self.restarts_done(step - 1)

    def restarts_done(self, step: int) -> int:
        """Number of restarts up to `step`, one that is due at `step` counted."""
        if self.restart_every is None:
            return 0
        last = self.max_steps if self.restart_at_end else self.max_steps - 1
        return max(0, min(step, last) - self.warm_start_steps) // self.restart_every

    def last_restart(self, step: int) -> int | None:
        """The last step <= `step` at which the run restarted or switched from the warm start; None before both."""
        num_restarts = self.restarts_done(min(step, self.max_steps - 1))  # one at the end re-warms nothing
        if num_restarts and self.restart_every is not None:
            return self.warm_start_steps + num_restarts * self.restart_every
        return self.warm_start_steps if 0 < self.warm_start_steps <= step else None

    def stage(self, step: int) -> StageName:
        """The stage of the update from `step` to `step + 1`. The switch belongs to the low-rank stage."""
        return "full_rank" if step < self.warm_start_steps else "low_rank"

    @property
    def has_low_rank_stage(self) -> bool:
        """Whether any update is a low-rank one."""
        return self.warm_start_steps < self.max_steps


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
    """The factor on the peak learning rate in the update from `step` to `step + 1`; arguments as of `Schedule`.

    Raises:
        ValueError: a value is out of its range, or a restart would fall into the re-warm-up of the last.
    """
    schedule = Schedule(
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        restart_every=restart_every,
        restart_warmup_steps=restart_warmup_steps,
        min_lr_ratio=min_lr_ratio,
        warm_start_steps=warm_start_steps,
    )
    return schedule.multiplier(step)
