"""Rules that join two keys or more. A rule is skipped while one of its keys is itself wrong."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from relora.config.schema import Config


@dataclass(frozen=True)
class Rule:
    """`broken` returns what is wrong with a configuration, or None."""

    keys: tuple[str, ...]
    broken: Callable[[Config], str | None]


def broken_rules(config: Config, *, wrong_keys: Iterable[str] = ()) -> list[str]:
    """One line for each broken rule."""
    wrong = set(wrong_keys)
    said = (rule.broken(config) for rule in RULES if not wrong.intersection(rule.keys))
    return [line for line in said if line]


def _one_model(c: Config) -> str | None:
    given = [key for key in ("config", "name_or_path") if getattr(c.model, key) is not None]
    if len(given) == 1:
        return None
    both = "both are set" if given else "neither is set"
    return f"model.config, model.name_or_path: set exactly one (from scratch, or continual training); {both}"


def _revision(c: Config) -> str | None:
    if c.model.revision is None or c.model.name_or_path is not None:
        return None
    return f"model.revision = {c.model.revision}: goes with model.name_or_path only"


def _warmup(c: Config) -> str | None:
    if c.schedule.warmup_steps < c.training.max_steps:
        return None
    return (
        f"schedule.warmup_steps = {c.schedule.warmup_steps}: must be smaller than "
        f"training.max_steps = {c.training.max_steps}"
    )


def _restart_warmup(c: Config) -> str | None:
    every, warmup = c.relora.restart_every, c.schedule.restart_warmup_steps
    if c.training.method != "relora" or every is None or every >= warmup:
        return None
    return f"relora.restart_every = {every}: must be at least schedule.restart_warmup_steps = {warmup}"


def _warm_start(c: Config) -> str | None:
    if c.training.method == "full" or c.relora.warm_start_steps < c.training.max_steps:
        return None
    return (
        f"relora.warm_start_steps = {c.relora.warm_start_steps}: must be smaller than "
        f"training.max_steps = {c.training.max_steps}, or there is no low-rank stage"
    )


def _batch(c: Config) -> str | None:
    whole, part = c.training.global_batch_size, c.training.per_device_batch_size
    if whole % part == 0:
        return None
    return f"training.global_batch_size = {whole}: must be a multiple of training.per_device_batch_size = {part}"


def _batch_of_processes(c: Config) -> str | None:
    whole, part, n = c.training.global_batch_size, c.training.per_device_batch_size, c.training.num_processes
    if n is None or whole % part or whole % (part * n) == 0:
        return None
    return (
        f"training.global_batch_size = {whole}: must be a multiple of training.per_device_batch_size x "
        f"training.num_processes = {part} x {n} = {part * n}"
    )


def _eval_tokens(c: Config) -> str | None:
    if c.data.eval_tokens >= c.data.sequence_length:
        return None
    return (
        f"data.eval_tokens = {c.data.eval_tokens}: must hold at least one sample of "
        f"data.sequence_length = {c.data.sequence_length}"
    )


def _trainable(c: Config) -> str | None:
    pattern = c.training.trainable
    if pattern is None:
        return None
    if c.training.method != "full":
        return f"training.trainable = {pattern}: goes with training.method = full only"
    return _regex("training.trainable", pattern)


def _targets(c: Config) -> str | None:
    targets = c.lora.target_modules
    return _regex("lora.target_modules", targets) if isinstance(targets, str) else None


def _regex(key: str, pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{key} = {pattern}: not a regular expression ({error})"
    return None


def _carry_residual(c: Config) -> str | None:
    if not c.relora.carry_residual:
        return None
    if c.lora.base_dtype not in ("int8", "nf4"):
        return f"relora.carry_residual = true: needs lora.base_dtype int8 or nf4, not {c.lora.base_dtype}"
    if c.relora.sync == "restart":
        return (
            "relora.carry_residual = true: needs relora.sync = step; processes that train apart draw their own factors"
        )
    return None


def _forward(c: Config) -> str | None:
    if c.training.method == "full" or c.lora.forward != "merged":
        return None
    if c.lora.lora_dropout > 0:
        return f"lora.forward = merged: lora.lora_dropout = {c.lora.lora_dropout} drops inputs of A alone; must be 0"
    if c.lora.base_dtype != "float32":
        return f"lora.forward = merged: lora.base_dtype = {c.lora.base_dtype} rounds small updates away; needs float32"
    return None


def _sync(c: Config) -> str | None:
    if c.relora.sync == "step":
        return None
    every, since = c.relora.restart_every, c.training.max_steps - c.relora.warm_start_steps
    if c.training.method != "relora" or every is None:
        return "relora.sync = restart: needs training.method relora and relora.restart_every, the processes meet there"
    if since % every:
        return (
            f"relora.sync = restart: training.max_steps = {c.training.max_steps} must be relora.warm_start_steps "
            f"plus a multiple of relora.restart_every = {every}, so that the processes meet at the end"
        )
    return None


def _outer(c: Config) -> str | None:
    defaults = type(c.relora)()
    for key in ("outer_learning_rate", "outer_momentum"):
        value = getattr(c.relora, key)
        if c.relora.sync == "step" and value != getattr(defaults, key):
            return f"relora.{key} = {value}: goes with relora.sync = restart only"
    return None


def _document_mask(c: Config) -> str | None:
    kernel = c.model.attn_implementation
    if not c.data.document_mask or kernel in ("eager", "sdpa"):
        return None
    return f"data.document_mask = true: needs model.attn_implementation eager or sdpa, not {kernel}"


def _flash(c: Config) -> str | None:
    kernel = c.model.attn_implementation
    if not kernel.startswith("flash") or c.training.mixed_precision == "bf16":
        return None
    return f"model.attn_implementation = {kernel}: needs training.mixed_precision bf16"


RULES = (
    Rule(("model.config", "model.name_or_path"), _one_model),
    Rule(("model.revision", "model.name_or_path"), _revision),
    Rule(("schedule.warmup_steps", "training.max_steps"), _warmup),
    Rule(("relora.restart_every", "schedule.restart_warmup_steps", "training.method"), _restart_warmup),
    Rule(("relora.warm_start_steps", "training.max_steps", "training.method"), _warm_start),
    Rule(("training.global_batch_size", "training.per_device_batch_size"), _batch),
    Rule(
        ("training.global_batch_size", "training.per_device_batch_size", "training.num_processes"), _batch_of_processes
    ),
    Rule(("data.eval_tokens", "data.sequence_length"), _eval_tokens),
    Rule(("training.trainable", "training.method"), _trainable),
    Rule(("lora.target_modules",), _targets),
    Rule(("relora.carry_residual", "lora.base_dtype", "relora.sync"), _carry_residual),
    Rule(("lora.forward", "lora.lora_dropout", "lora.base_dtype", "training.method"), _forward),
    Rule(
        ("relora.sync", "training.method", "relora.restart_every", "relora.warm_start_steps", "training.max_steps"),
        _sync,
    ),
    Rule(("relora.sync", "relora.outer_learning_rate", "relora.outer_momentum"), _outer),
    Rule(("data.document_mask", "model.attn_implementation"), _document_mask),
    Rule(("model.attn_implementation", "training.mixed_precision"), _flash),
)
