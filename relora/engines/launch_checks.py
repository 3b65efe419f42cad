"""Launches and combinations that no engine can do as they are meant. docs/engines.md gives the reason for each."""

import os

from relora.config import Config
from relora.engines.deepspeed_config import deepspeed_problems
from relora.engines.world import launched_engine
from relora.method.optimizer import optimizer_problems

NOT_THERE = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_TP": "tensor parallelism"}
SIZES_NOT_THERE = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "hybrid sharding",
}


def launch_refusals(config: Config, num_processes: int) -> list[str]:
    """Why this launch would not train as the launcher's environment and the configuration say, one line each."""
    problems = [
        f"the launcher asks for {name} ({variable}=true): relora has one process, DDP, FSDP2 and DeepSpeed ZeRO; "
        "use one of the files in launch/"
        for variable, name in NOT_THERE.items()
        if os.environ.get(variable, "false").lower() in ("true", "1")
    ]
    problems += [
        f"the launcher asks for {name} ({variable}={os.environ[variable]}): relora has one process, DDP, FSDP2 and "
        "DeepSpeed ZeRO; use one of the files in launch/"
        for variable, name in SIZES_NOT_THERE.items()
        if int(os.environ.get(variable, "1")) > 1
    ]
    kind = launched_engine()
    if kind == "deepspeed":
        problems += deepspeed_problems(config, num_processes)
    if kind == "fsdp2" and os.environ.get("FSDP_VERSION", "1") != "2":
        problems.append("FSDP: fsdp_version 1 cannot hold frozen and trained weights in one unit; set fsdp_version: 2")
    if kind == "fsdp2" and os.environ.get("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "false") == "true":
        problems.append(
            "FSDP: fsdp_activation_checkpointing_offload: activations are computed again, none is kept on the host; "
            "set it to false"
        )
    problems += optimizer_problems(config.optim.name, setting="optim.name")
    if kind != "local" and config.optim.name == "adamw_8bit":
        problems.append("optim.name = adamw_8bit: needs one process or DDP, in which every parameter is whole")
    if kind != "local" and config.relora.sync == "restart":
        problems.append("relora.sync = restart: needs DDP, in which every process holds its own whole model")
    return problems
