"""The only files that know accelerate, DeepSpeed or FSDP."""

from relora.config import Config
from relora.config.derived import batch_problems
from relora.engines.base import Batch, Engine, Queued, TrainState, Update, read
from relora.engines.ddp import DDPEngine
from relora.engines.deepspeed import DeepSpeedEngine
from relora.engines.deepspeed_config import deepspeed_settings, launched_zero_stage, wants_own_optimizer
from relora.engines.fsdp2 import FSDP2Engine, fsdp_options
from relora.engines.launch_checks import launch_refusals
from relora.engines.local_sgd import LocalSGDEngine, resume_problems
from relora.engines.outer import OuterOptimizer
from relora.engines.world import (
    World,
    is_first,
    is_first_on_node,
    launched_engine,
    launched_num_processes,
    launched_process_index,
    world_problems,
)

__all__ = [
    "Batch",
    "Engine",
    "TrainState",
    "World",
    "Queued",
    "Update",
    "connect",
    "is_first",
    "is_first_on_node",
    "launched_engine",
    "launched_process_index",
    "launched_num_processes",
    "launched_zero_stage",
    "problems",
    "read",
    "resume_problems",
]


def problems(config: Config, num_processes: int) -> list[str]:
    """What is wrong with a launch of `num_processes` for `config`, one line each."""
    return [
        *launch_refusals(config, num_processes),
        *world_problems(num_processes, config.training.num_processes),
        *batch_problems(config, num_processes),
    ]


def connect(config: Config) -> Engine:
    """Join the processes of this launch. Raises UserError when they are not what the launch promises."""
    training, kind = config.training, launched_engine()
    world = World(wanted=training.num_processes, alone_too=kind != "local")
    precision, max_grad_norm = training.mixed_precision, config.optim.max_grad_norm
    if kind == "fsdp2":
        return FSDP2Engine(
            world,
            fsdp_options(),
            mixed_precision=precision,
            max_grad_norm=max_grad_norm,
            sync_each_batch=training.sync_each_batch,
        )
    if kind == "deepspeed":
        settings = deepspeed_settings(config, world.num_processes)
        return DeepSpeedEngine(world, settings, mixed_precision=precision, own_optimizer=wants_own_optimizer())
    if config.relora.sync == "restart":
        outer = OuterOptimizer(config.relora.outer_learning_rate, config.relora.outer_momentum)
        return LocalSGDEngine(world, mixed_precision=precision, max_grad_norm=max_grad_norm, outer=outer)
    return DDPEngine(world, mixed_precision=precision, max_grad_norm=max_grad_norm)
