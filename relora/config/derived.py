"""Numbers and objects that follow from a configuration, and the fingerprint that identifies the run."""

from typing import Any

from relora.config.input_sections import SourceSection
from relora.config.reference import fields, in_identity
from relora.config.rules import factors_peak
from relora.config.schema import Config
from relora.files import expand_path, sha256_of_json
from relora.method.lora import LoRAConfig
from relora.method.registry import resolve_object
from relora.method.reinit import REINITS, Offset, Reinit
from relora.method.schedule import Schedule


def schedule_of(config: Config) -> Schedule:
    """Learning rates and restarts of a run. Raises ValueError as `Schedule` does."""
    training, relora = config.training, config.relora
    return Schedule(
        max_steps=training.max_steps,
        warmup_steps=config.schedule.warmup_steps,
        restart_every=relora.restart_every if training.method == "relora" else None,
        restart_warmup_steps=config.schedule.restart_warmup_steps,
        min_lr_ratio=config.schedule.min_lr_ratio,
        warm_start_steps=training.max_steps if training.method == "full" else relora.warm_start_steps,
        learning_rate=config.optim.learning_rate,
        warm_start_learning_rate=config.optim.warm_start_learning_rate,
        # Processes that train separately synchronize at the end too.
        restart_at_end=relora.sync == "restart",
    )


def batch_problems(config: Config, num_processes: int) -> list[str]:
    """Why the global batch does not divide into per-device batches over `num_processes` processes."""
    batch, micro_batch = config.training.global_batch_size, config.training.per_device_batch_size
    if batch % (micro_batch * num_processes) == 0:
        return []
    return [
        f"training.global_batch_size = {batch}: must be a multiple of training.per_device_batch_size x "
        f"processes = {micro_batch} x {num_processes} = {micro_batch * num_processes}"
    ]


def accumulation_steps(config: Config, num_processes: int) -> int:
    """Micro-batches per update and process. Raises ValueError with `batch_problems`."""
    for problem in batch_problems(config, num_processes):
        raise ValueError(problem)
    return config.training.global_batch_size // (config.training.per_device_batch_size * num_processes)


def lora_config(config: Config) -> LoRAConfig:
    """The settings of the wrapped layers; `auto` is resolved by whether the model is pretrained."""
    lora, pretrained = config.lora, config.model.name_or_path is not None
    # null trains nothing in full, not even the head of a classifier.
    auto: Any = None if pretrained else "rest"
    modules_to_save = auto if lora.modules_to_save == "auto" else lora.modules_to_save or ()
    return LoRAConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        base_dtype=lora.base_dtype,
        modules_to_save=modules_to_save,
        forward=lora.forward,
        keep_merged=lora.keep_merged,
        kernels=lora.kernels,
    )


def reinit_policy(config: Config) -> Reinit:
    """How factors begin. ValueError if the name stands for nothing."""
    if config.relora.reinit == "offset":
        return Offset(config.relora.offset_norm * factors_peak(config))
    return resolve_object("relora.reinit", config.relora.reinit, REINITS, Reinit)  # type: ignore[type-abstract]


def tokenizer_of(config: Config) -> dict[str, Any]:
    """The tokenizer that the configuration names, as arguments of `relora.data.prepare`.

    It is that of `data.tokenizer`, else that of the pretrained model in the revision of its weights, else None, and one
    is trained.
    """
    is_models = config.data.tokenizer is None
    return {
        "tokenizer": config.model.name_or_path if is_models else config.data.tokenizer,
        "revision": config.model.revision if is_models else None,
        "trust_remote_code": config.model.trust_remote_code,
    }


def derived_numbers(config: Config, num_processes: int) -> dict[str, Any]:
    """Numbers that a reader of the log wants to know: batch, tokens, restarts, reachable rank."""
    schedule, training = schedule_of(config), config.training
    numbers: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation_steps(config, num_processes),
        "tokens_per_update": training.global_batch_size * config.data.sequence_length,
        "tokens_in_all": training.max_steps * training.global_batch_size * config.data.sequence_length,
    }
    if schedule.has_low_rank_stage:
        restarts = schedule.restarts_done(schedule.max_steps)
        numbers |= {
            "lora_scale": lora_config(config).scale,
            "restarts": restarts,
            "reachable_rank": (restarts + 1) * rank_of_a_cycle(config),
        }
    return numbers


def rank_of_a_cycle(config: Config) -> int:
    """The rank that W can change by between two restarts: that of B A - B0 A0 where factors begin with B0 != 0."""
    return (2 if config.relora.reinit == "offset" else 1) * config.lora.r


def identity(config: Config, model_config: dict[str, Any]) -> dict[str, Any]:
    """The settings that define a run, flat by dotted key: those that change its result, not how it is computed.

    A key that was added after a release is left out while it has its default, so that the identity of an older run
    does not change.

    Args:
        model_config: the Hugging Face config of the model, in place of the path it was read from.
    """
    settings: dict[str, Any] = {}
    for key, field in fields():
        if "[]" in key:
            continue  # of an entry of data.sources, below
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if in_identity(field, value):
            settings[key] = value
    sources = [
        {name: value for name, value in source if in_identity(SourceSection.model_fields[name], value)}
        for source in config.data.sources
    ]
    return settings | {"model.config": model_config, "data.sources": sources}


def expanded(identity: dict[str, Any]) -> dict[str, Any]:
    """`identity`, of a run that was begun before ~ and variables in paths were expanded, with its paths expanded.

    Raises:
        ValueError: as `expand_path`.
    """
    paths = {key: expand_path(identity[key]) for key in ("model.name_or_path", "data.tokenizer") if identity.get(key)}
    sources = [source | {"path": expand_path(source["path"])} for source in identity.get("data.sources") or ()]
    return identity | paths | ({"data.sources": sources} if sources else {})


def fingerprint(identity: dict[str, Any]) -> str:
    """A hash of `identity`, whatever the order of its keys."""
    return sha256_of_json(identity)[:16]
