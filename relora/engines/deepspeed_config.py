"""DeepSpeed's configuration out of accelerate's options and ours, and what of it is refused."""

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import DeepSpeedPlugin

from relora.config import Config
from relora.config.derived import accumulation_steps

# What users may set in a DeepSpeed configuration file. Anything else might change what is trained: it is refused.
ALLOWED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "flops_profiler",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
ALLOWED_ZERO = {
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "sub_group_size",
    "offload_optimizer",
    "offload_param",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
}


def deepspeed_problems(config: Config, num_processes: int) -> list[str]:
    """One line for each of the launcher's DeepSpeed options that relora refuses."""
    if importlib.util.find_spec("deepspeed") is None:
        return ["the launcher asks for DeepSpeed, which is not installed: pip install 'relora[deepspeed]'"]
    asked = _without_auto(DeepSpeedPlugin().deepspeed_config)
    problems = [*_of_sections(asked), *_of_numbers(asked, config, num_processes), *_of_optimizer(asked)]
    return [f"DeepSpeed: {problem}" for problem in problems]


def deepspeed_settings(config: Config, num_processes: int) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`: the launcher's, completed from ours."""
    training = config.training
    return _without_auto(DeepSpeedPlugin().deepspeed_config) | {
        "train_micro_batch_size_per_gpu": training.per_device_batch_size,
        "train_batch_size": training.per_device_batch_size * num_processes,
        # The engine scales the loss and marks the last micro-batch of each update.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": wants_deepspeed_adamw(),
        # Parameters stay fp32; no module's gradients or weights are sent in bf16.
        "torch_autocast": {
            "enabled": training.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


def launched_zero_stage() -> int:
    """The stage of ZeRO that the launcher asks for."""
    return int(DeepSpeedPlugin().deepspeed_config["zero_optimization"]["stage"])


def wants_deepspeed_adamw() -> bool:
    """Whether the DeepSpeed configuration has a section for an optimizer of its own."""
    return "optimizer" in _without_auto(DeepSpeedPlugin().deepspeed_config)


def _of_sections(asked: Mapping[str, Any]) -> Iterator[str]:
    zero = asked["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        yield f"zero_optimization.stage = {zero['stage']}: must be 1, 2 or 3; without ZeRO use launch/ddp.yaml"
    for name in ("fp16", "bf16", "torch_autocast"):
        if asked.get(name, {}).get("enabled"):
            yield f"{name}.enabled = true: not supported; set training.mixed_precision instead (parameters stay fp32)"
    for key in sorted(asked.keys() - ALLOWED - {"fp16", "bf16", "torch_autocast"}):
        yield f"{key}: not supported, as its effect on restarts is unknown; remove it"
    for key in sorted(zero.keys() - ALLOWED_ZERO):
        yield f"zero_optimization.{key}: not supported, as its effect on restarts is unknown; remove it"
    for what in ("offload_optimizer", "offload_param"):
        device = zero.get(what, {}).get("device")
        if device not in (None, "none", "cpu"):
            key = f"zero_optimization.{what}.device"
            yield f"{key} = {device}: must be none or cpu: a restart cannot reach tensors anywhere else"


def _of_numbers(asked: Mapping[str, Any], config: Config, num_processes: int) -> Iterator[str]:
    training, clipping = config.training, config.optim.max_grad_norm or 0.0
    ours = {
        "train_batch_size": (training.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (training.per_device_batch_size, "training.per_device_batch_size"),
        "gradient_clipping": (clipping, "optim.max_grad_norm"),
    }
    for key, (value, name) in ours.items():
        if asked.get(key, value) != value:
            yield f"{key} = {asked[key]}: conflicts with {name} = {value}; remove it or set it to auto"
    if training.global_batch_size % (training.per_device_batch_size * num_processes) == 0:
        steps = accumulation_steps(config, num_processes)
        if asked.get("gradient_accumulation_steps", 1) not in (1, steps):
            found = asked["gradient_accumulation_steps"]
            yield (f"gradient_accumulation_steps = {found}: the batch sizes imply {steps}; remove it or set it to auto")


def _of_optimizer(asked: Mapping[str, Any]) -> Iterator[str]:
    section = asked.get("optimizer")
    if section is None:
        return
    if section.get("type") not in ("Adam", "AdamW"):
        yield f"optimizer.type = {section.get('type')}: must be AdamW (DeepSpeed's own) or left out (torch's)"
    for key in section.get("params", {}):
        yield f"optimizer.params.{key}: set it in relora's optim section; remove it here or set it to auto"


def _without_auto(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are set: "auto" and null leave the choice to relora or DeepSpeed."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found[key] = _without_auto(value)
        elif value not in ("auto", None):
            found[key] = value
    return found
