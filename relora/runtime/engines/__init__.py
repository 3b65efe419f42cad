"""The only files that know accelerate, DeepSpeed or FSDP."""

from relora.config import Config
from relora.method.outer import OuterOptimizer
from relora.runtime.engines.apart import ApartEngine
from relora.runtime.engines.base import Batch, Engine, Live, Queued, Update, read
from relora.runtime.engines.deepspeed import DeepSpeedEngine
from relora.runtime.engines.deepspeed_options import deepspeed_settings, launched_zero_stage, wants_own_optimizer
from relora.runtime.engines.fsdp2 import FSDP2Engine
from relora.runtime.engines.launches import (
    check_world,
    is_first,
    is_first_on_node,
    launched_engine,
    launched_rank,
    launched_world_size,
)
from relora.runtime.engines.local import LocalEngine
from relora.runtime.engines.options import fsdp_options
from relora.runtime.engines.processes import Processes
from relora.runtime.engines.refusals import launch_refusals

__all__ = [
    "Batch",
    "Engine",
    "Live",
    "Processes",
    "Queued",
    "Update",
    "check_world",
    "connect",
    "is_first",
    "is_first_on_node",
    "launch_refusals",
    "launched_engine",
    "launched_rank",
    "launched_world_size",
    "launched_zero_stage",
    "read",
]


def connect(config: Config) -> Engine:
    """Join the processes of this launch. Raises UserError when they are not what the launch promises."""
    training, kind = config.training, launched_engine()
    processes = Processes(num_processes=training.num_processes, alone_too=kind != "local")
    precision, max_grad_norm = training.mixed_precision, config.optim.max_grad_norm
    if kind == "fsdp2":
        return FSDP2Engine(
            processes,
            fsdp_options(),
            mixed_precision=precision,
            max_grad_norm=max_grad_norm,
            sync_each_batch=training.sync_each_batch,
        )
    if kind == "deepspeed":
        settings = deepspeed_settings(config, processes.world_size)
        return DeepSpeedEngine(processes, settings, mixed_precision=precision, own_optimizer=wants_own_optimizer())
    if config.relora.sync == "restart":
        outer = OuterOptimizer(config.relora.outer_learning_rate, config.relora.outer_momentum)
        return ApartEngine(processes, mixed_precision=precision, max_grad_norm=max_grad_norm, outer=outer)
    return LocalEngine(processes, mixed_precision=precision, max_grad_norm=max_grad_norm)
