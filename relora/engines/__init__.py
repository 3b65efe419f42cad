"""Engines: ways to spread training over processes. The only files that know accelerate, DeepSpeed or FSDP."""

from collections.abc import Callable

from relora.config import Config
from relora.engines.base import Engine, TrainState, Update
from relora.engines.ddp import DDPEngine, OneProcessEngine
from relora.engines.deepspeed import DeepSpeedEngine
from relora.engines.fsdp2 import FSDP2Engine
from relora.engines.launch_checks import problems
from relora.engines.local_sgd import LocalSGDEngine, resume_problems
from relora.engines.world import (
    World,
    is_first,
    is_first_on_node,
    launched_engine,
    launched_num_processes,
    launched_process_index,
)
from relora.method.registry import resolve
from relora.model.tasks import Task, task_of

__all__ = [
    "ENGINES",
    "Engine",
    "TrainState",
    "Update",
    "World",
    "connect",
    "is_first",
    "is_first_on_node",
    "launched_engine",
    "launched_num_processes",
    "launched_process_index",
    "problems",
    "resume_problems",
]

ENGINES: dict[str, Callable[[Config, World, Task], Engine]] = {
    "one process": OneProcessEngine.from_config,
    "ddp": DDPEngine.from_config,
    "local sgd": LocalSGDEngine.from_config,
    "fsdp2": FSDP2Engine.from_config,
    "deepspeed": DeepSpeedEngine.from_config,
}


def connect(config: Config) -> Engine:
    """Join the processes of this launch, by the engine that the launcher asks for or `training.engine` names.

    Raises:
        UserError: the processes are not what the launch promises.
    """
    launched = launched_engine()
    world = World(wanted=config.training.num_processes, alone_too=launched != "ddp")
    name: str = launched
    if config.training.engine != "auto":
        name = config.training.engine
    elif launched == "ddp" and config.relora.sync == "restart":
        name = "local sgd"
    elif launched == "ddp" and world.num_processes == 1:
        name = "one process"
    return resolve("training.engine", name, ENGINES)(config, world, task_of(config))
