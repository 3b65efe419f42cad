"""Unsupported launches and option combinations. docs/engines.md gives the reason for each."""

import os

from relora.config import Config
from relora.config.derived import batch_problems
from relora.engines import local_sgd
from relora.engines.deepspeed_config import deepspeed_problems
from relora.engines.world import launched_engine, world_problems
from relora.method.optimizer import FACTOR_OPTIMIZERS, optimizer_problems, steps_matrices
from relora.method.registry import resolve

# Variables by which accelerate passes on what a launch asks for, and relora has no engine for.
UNSUPPORTED = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_TP": "tensor parallelism"}
UNSUPPORTED_SIZES = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "hybrid sharding",
}


def problems(config: Config, num_processes: int) -> list[str]:
    """One line for each reason why a launch would not train as its environment and the configuration say."""
    engine = launched_engine()
    name = config.optim.name
    is_sharded_8bit = engine != "ddp" and name == "adamw_8bit"
    has_sharded_matrices = engine != "ddp" and steps_matrices(name)
    own = config.optim.factors if config.training.method != "full" else None
    is_split = engine != "ddp" and own is not None
    return [
        *_unsupported_launches(),
        *(deepspeed_problems(config, num_processes) if engine == "deepspeed" else []),
        *(_fsdp_problems() if engine == "fsdp2" else []),
        *optimizer_problems(name, setting="optim.name"),
        *optimizer_problems(config.optim.factors, setting="optim.factors", known=FACTOR_OPTIMIZERS),
        *(["optim.name = adamw_8bit: needs one process or DDP, in which every parameter is whole"] * is_sharded_8bit),
        *([f"optim.name = {name}: needs one process or DDP, in which every matrix is whole"] * has_sharded_matrices),
        *([f"optim.factors = {own}: needs one process or DDP, in which every factor is whole"] * is_split),
        *local_sgd.launch_problems(config, engine),
        *_custom_engine_problems(config),
        *world_problems(num_processes, config.training.num_processes),
        *batch_problems(config, num_processes),
    ]


def _unsupported_launches() -> list[str]:
    """Kinds of parallelism that the launcher's environment asks for and no engine has."""
    asked = {
        f"{name} ({variable}=true)"
        for variable, name in UNSUPPORTED.items()
        if os.environ.get(variable, "false").lower() in ("true", "1")
    } | {
        f"{name} ({variable}={os.environ[variable]})"
        for variable, name in UNSUPPORTED_SIZES.items()
        if int(os.environ.get(variable, "1")) > 1
    }
    return [
        f"the launcher asks for {name}: relora has one process, DDP, FSDP2 and DeepSpeed ZeRO; "
        "use one of the files in launch/"
        for name in sorted(asked)
    ]


def _custom_engine_problems(config: Config) -> list[str]:
    """`training.engine` names something that cannot be imported or called."""
    name = config.training.engine
    if name == "auto":
        return []
    try:
        engine: object = resolve("training.engine", name, {})
    except ValueError as error:
        return [str(error)]
    return [] if callable(engine) else [f"training.engine = {name}: must be a function (config, world, task) -> Engine"]


def _fsdp_problems() -> list[str]:
    """Options of accelerate's FSDP section that cannot be met."""
    found = []
    if os.environ.get("FSDP_VERSION", "1") != "2":
        found.append("FSDP: fsdp_version 1 cannot hold frozen and trained weights in one unit; set fsdp_version: 2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "false") == "true":
        found.append(
            "FSDP: fsdp_activation_checkpointing_offload: activations are recomputed, none is kept on the host; "
            "set it to false"
        )
    return found
