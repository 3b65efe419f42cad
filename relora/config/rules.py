"""Cross-field validation rules. A rule is skipped while one of its keys is itself wrong."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from relora.config.schema import Config
from relora.text import without_secrets


@dataclass(frozen=True)
class Rule:
    """The keys that a rule joins, and the function that returns the problem of a configuration that breaks it."""

    keys: tuple[str, ...]
    problem: Callable[[Config], str | None]


def broken_rules(config: Config, *, wrong_keys: Iterable[str] = ()) -> list[str]:
    """One line for each broken rule.

    Args:
        wrong_keys: keys whose own value is not allowed; the rules that join them are skipped.
    """
    wrong = set(wrong_keys)
    problems = (rule.problem(config) for rule in RULES if not wrong.intersection(rule.keys))
    return [problem for problem in problems if problem]


def secret_problems(config: Config) -> list[str]:
    """One line with the keys that hold a secret: the run folder keeps the settings, and the model card shows them."""

    def places(value: Any, key: str) -> Iterator[str]:
        if isinstance(value, str) and without_secrets(value) != value:
            yield key
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, inner in items:
            yield from places(inner, f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}".lstrip("."))

    found = list(places(config.model_dump(mode="json"), ""))
    if not found:
        return []
    return [
        f"{', '.join(found)}: holds a password or a token, which config.yaml and the model card would show; set it in "
        "the environment, such as HF_TOKEN"
    ]


def one_model(config: Config) -> str | None:
    """The model is either built from a config or loaded with its weights."""
    given = [key for key in ("config", "name_or_path") if getattr(config.model, key) is not None]
    if len(given) == 1:
        return None
    both = "both are set" if given else "neither is set"
    return f"model.config, model.name_or_path: set exactly one (from scratch, or continual training); {both}"


def revision_of_a_hub_model(config: Config) -> str | None:
    """A revision selects a commit of a pretrained model; a config has none."""
    if config.model.revision is None or config.model.name_or_path is not None:
        return None
    return f"model.revision = {config.model.revision}: goes with model.name_or_path only"


def warmup_ends(config: Config) -> str | None:
    """The learning rate must reach its peak: the cosine is defined from the end of the warm-up to max_steps."""
    if config.schedule.warmup_steps < config.training.max_steps:
        return None
    return (
        f"schedule.warmup_steps = {config.schedule.warmup_steps}: must be smaller than "
        f"training.max_steps = {config.training.max_steps}"
    )


def restart_warmup_ends(config: Config) -> str | None:
    """A re-warm-up must be over before the next restart."""
    every, warmup = config.relora.restart_every, config.schedule.restart_warmup_steps
    if config.training.method != "relora" or every is None or every >= warmup:
        return None
    return f"relora.restart_every = {every}: must be at least schedule.restart_warmup_steps = {warmup}"


def warm_start_ends(config: Config) -> str | None:
    """The warm start must leave updates for the low-rank stage."""
    if config.training.method == "full" or config.relora.warm_start_steps < config.training.max_steps:
        return None
    return (
        f"relora.warm_start_steps = {config.relora.warm_start_steps}: must be smaller than "
        f"training.max_steps = {config.training.max_steps}, or there is no low-rank stage"
    )


def whole_micro_batches(config: Config) -> str | None:
    """A global batch consists of whole micro-batches."""
    batch, micro_batch = config.training.global_batch_size, config.training.per_device_batch_size
    if batch % micro_batch == 0:
        return None
    return f"training.global_batch_size = {batch}: must be a multiple of training.per_device_batch_size = {micro_batch}"


def whole_micro_batches_per_process(config: Config) -> str | None:
    """Each process computes the same number of micro-batches per update."""
    batch, micro_batch = config.training.global_batch_size, config.training.per_device_batch_size
    n = config.training.num_processes
    if n is None or batch % micro_batch or batch % (micro_batch * n) == 0:
        return None
    return (
        f"training.global_batch_size = {batch}: must be a multiple of training.per_device_batch_size x "
        f"training.num_processes = {micro_batch} x {n} = {micro_batch * n}"
    )


def ranges_of_samples(config: Config) -> str | None:
    """A range of samples to leave out begins before it ends."""
    for first, end in config.data.skip:
        if first >= end:
            return (
                f"data.skip = [[{first}, {end}]]: a pair [first, end] leaves out the samples first <= i < end, so "
                "first must be smaller than end"
            )
    return None


def one_evaluation_row(config: Config) -> str | None:
    """The held-out set must hold at least one row."""
    if config.data.eval_tokens >= config.data.sequence_length:
        return None
    return (
        f"data.eval_tokens = {config.data.eval_tokens}: must hold at least one sample of "
        f"data.sequence_length = {config.data.sequence_length}"
    )


def trainable_of_method_full(config: Config) -> str | None:
    """Only method full selects parameters by a regex; low-rank methods have lora.modules_to_save."""
    pattern = config.training.trainable
    if pattern is None:
        return None
    if config.training.method != "full":
        return f"training.trainable = {pattern}: goes with training.method = full only"
    return _regex("training.trainable", pattern)


def target_pattern(config: Config) -> str | None:
    """A string is `all-linear` or a regex of module names; a list holds suffixes."""
    targets = config.lora.target_modules
    if not isinstance(targets, str):
        return None
    if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", targets):  # a regex by its form alone: no name has a comma
        as_list = ", ".join(part.strip() for part in targets.split(","))
        return f"lora.target_modules = {targets}: is one regex of whole names; a list is written [{as_list}]"
    return _regex("lora.target_modules", targets)


def _regex(key: str, pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{key} = {pattern}: not a regular expression ({error})"
    return None


def residual_of_quantized_weights(config: Config) -> str | None:
    """Only quantized weights have a residual, and a single one only if all processes train the same factors."""
    if not config.relora.carry_residual:
        return None
    if config.lora.base_dtype not in ("int8", "nf4"):
        return f"relora.carry_residual = true: needs lora.base_dtype int8 or nf4, not {config.lora.base_dtype}"
    if config.relora.sync == "restart":
        return "relora.carry_residual = true: needs relora.sync = step; else each process draws its own factors"
    return None


def offset_of_factors(config: Config) -> str | None:
    """W gives up one product s B A, which all processes train on; its size is a number of peak learning rates."""
    if config.relora.reinit != "offset":
        return None
    if config.relora.sync == "restart":
        return "relora.reinit = offset: needs relora.sync = step; else each process draws its own factors"
    if factors_peak(config) == 0:
        return "relora.reinit = offset: the learning rate of the factors, by which relora.offset_norm counts, is 0"
    return None


def factors_peak(config: Config) -> float:
    """The peak learning rate of A and B."""
    own, of_the_run = config.optim.factors_learning_rate, config.optim.learning_rate
    return of_the_run if own is None else own


def merged_forward(config: Config) -> str | None:
    """The merged route computes (W + s B A) x, which dropout on the input of A and a coarse W would change."""
    if config.training.method == "full" or config.lora.forward != "merged":
        return None
    dropout, dtype = config.lora.lora_dropout, config.lora.base_dtype
    if dropout > 0:
        return f"lora.forward = merged: lora.lora_dropout = {dropout} drops inputs of A alone; must be 0"
    if dtype != "float32":
        return f"lora.forward = merged: lora.base_dtype = {dtype} rounds small updates away; needs float32"
    return None


def fused_kernels(config: Config) -> str | None:
    """The Triton kernels read one x: there is none for a dropout on the input of A."""
    kernels, dropout = config.lora.kernels, config.lora.lora_dropout
    if config.training.method == "full" or kernels == "torch" or dropout == 0:
        return None
    return f"lora.kernels = {kernels}: lora.lora_dropout = {dropout} drops inputs of A alone; must be 0"


def synchronized_at_the_end(config: Config) -> str | None:
    """The last update must be a restart, where the processes average what they have learned."""
    if config.relora.sync == "step":
        return None
    every, since = config.relora.restart_every, config.training.max_steps - config.relora.warm_start_steps
    if config.training.method != "relora" or every is None:
        return (
            "relora.sync = restart: needs training.method relora and relora.restart_every, when processes synchronize"
        )
    if since % every:
        return (
            f"relora.sync = restart: training.max_steps = {config.training.max_steps} must be relora.warm_start_steps "
            f"plus a multiple of relora.restart_every = {every}, so that the processes synchronize at the end"
        )
    return None


def matrices_for_muon(config: Config) -> str | None:
    """Muon must have something to train: without a warm start every hidden matrix may be wrapped, and so frozen."""
    lora, training = config.lora, config.training
    all_wrapped = lora.target_modules == "all-linear" and lora.modules_to_save in ("auto", None)
    if config.optim.name != "muon" or training.method == "full" or config.relora.warm_start_steps or not all_wrapped:
        return None
    return (
        f"optim.name = muon: with training.method = {training.method} and no warm start no hidden matrix trains in "
        "full; set relora.warm_start_steps, narrow lora.target_modules, or choose another optimizer"
    )


def outer_optimizer(config: Config) -> str | None:
    """The outer optimizer applies the mean update of processes that synchronize at restarts."""
    defaults = type(config.relora)()
    for key in ("outer_learning_rate", "outer_momentum"):
        value = getattr(config.relora, key)
        if config.relora.sync == "step" and value != getattr(defaults, key):
            return f"relora.{key} = {value}: goes with relora.sync = restart only"
    return None


def mask_needs_a_kernel(config: Config) -> str | None:
    """Masks between packed documents are built for eager and sdpa only."""
    kernel = config.model.attn_implementation
    if not config.data.document_mask or kernel in ("eager", "sdpa"):
        return None
    return f"data.document_mask = true: needs model.attn_implementation eager or sdpa, not {kernel}"


def flash_in_bf16(config: Config) -> str | None:
    """Flash attention has no float32 kernels."""
    kernel = config.model.attn_implementation
    if not kernel.startswith("flash") or config.training.mixed_precision == "bf16":
        return None
    return f"model.attn_implementation = {kernel}: needs training.mixed_precision bf16"


RULES = (
    Rule(("model.config", "model.name_or_path"), one_model),
    Rule(("model.revision", "model.name_or_path"), revision_of_a_hub_model),
    Rule(("schedule.warmup_steps", "training.max_steps"), warmup_ends),
    Rule(("relora.restart_every", "schedule.restart_warmup_steps", "training.method"), restart_warmup_ends),
    Rule(("relora.warm_start_steps", "training.max_steps", "training.method"), warm_start_ends),
    Rule(("training.global_batch_size", "training.per_device_batch_size"), whole_micro_batches),
    Rule(
        ("training.global_batch_size", "training.per_device_batch_size", "training.num_processes"),
        whole_micro_batches_per_process,
    ),
    Rule(("data.skip",), ranges_of_samples),
    Rule(("data.eval_tokens", "data.sequence_length"), one_evaluation_row),
    Rule(("training.trainable", "training.method"), trainable_of_method_full),
    Rule(("lora.target_modules",), target_pattern),
    Rule(("relora.carry_residual", "lora.base_dtype", "relora.sync"), residual_of_quantized_weights),
    Rule(
        ("relora.reinit", "relora.sync", "optim.learning_rate", "optim.factors_learning_rate"),
        offset_of_factors,
    ),
    Rule(
        ("optim.name", "training.method", "relora.warm_start_steps", "lora.target_modules", "lora.modules_to_save"),
        matrices_for_muon,
    ),
    Rule(("lora.forward", "lora.lora_dropout", "lora.base_dtype", "training.method"), merged_forward),
    Rule(("lora.kernels", "lora.lora_dropout", "training.method"), fused_kernels),
    Rule(
        ("relora.sync", "training.method", "relora.restart_every", "relora.warm_start_steps", "training.max_steps"),
        synchronized_at_the_end,
    ),
    Rule(("relora.sync", "relora.outer_learning_rate", "relora.outer_momentum"), outer_optimizer),
    Rule(("data.document_mask", "model.attn_implementation"), mask_needs_a_kernel),
    Rule(("model.attn_implementation", "training.mixed_precision"), flash_in_bf16),
)
