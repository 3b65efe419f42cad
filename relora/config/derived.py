"""Numbers that follow from a configuration, and the fingerprint that says which run it is."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from relora.config.reference import fields, part_of_the_run
from relora.config.schema import Config
from relora.method.lora import LoRAConfig
from relora.method.schedule import Schedule


def schedule_of(config: Config) -> Schedule:
    """The learning rates and the restarts of a run. Raises ValueError as `Schedule` does."""
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
        # Processes that train apart synchronize at the end too.
        restart_at_end=relora.sync == "restart",
    )


def accumulation_steps(config: Config, num_processes: int) -> int:
    """Micro-batches per update and process.

    Raises:
        ValueError: the global batch does not divide into per-device batches over `num_processes` processes.
    """
    whole, part = config.training.global_batch_size, config.training.per_device_batch_size
    if whole % (part * num_processes):
        raise ValueError(
            f"training.global_batch_size = {whole}: must be a multiple of training.per_device_batch_size x "
            f"processes = {part} x {num_processes} = {part * num_processes}"
        )
    return whole // (part * num_processes)


def batch_problems(config: Config, num_processes: int) -> list[str]:
    """One line if the global batch does not divide into per-device batches over `num_processes` processes."""
    try:
        accumulation_steps(config, num_processes)
    except ValueError as error:
        return [str(error)]
    return []


def lora_config(config: Config) -> LoRAConfig:
    """The method's settings; `auto` is settled by whether the model is pretrained."""
    lora, pretrained = config.lora, config.model.name_or_path is not None
    auto: Any = None if pretrained else "rest"
    return LoRAConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        use_rslora=lora.use_rslora,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=lora.target_modules,
        base_dtype=lora.base_dtype,
        modules_to_save=auto if lora.modules_to_save == "auto" else lora.modules_to_save,
        forward=lora.forward,
        keep_merged=lora.keep_merged,
    )


def derived_numbers(config: Config, num_processes: int) -> dict[str, Any]:
    """For people: what the settings amount to."""
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
            "reachable_rank": (restarts + 1) * config.lora.r,
        }
    return numbers


def identity(config: Config, model_config: dict[str, Any]) -> dict[str, Any]:
    """What makes this run this run, flat by key: the settings that change the result, not how it is computed.

    Args:
        model_config: the Hugging Face config of the model, in place of the path it was read from.
    """
    named = {key: _value(config, key) for key, field in fields() if "[]" not in key and part_of_the_run(field)}
    sources = [source.model_dump(mode="json") for source in config.data.sources]
    return named | {"model.config": model_config, "data.sources": sources}


def fingerprint(identity: dict[str, Any]) -> str:
    """A hash of `identity`, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
