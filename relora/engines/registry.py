"""The engines by name, and which of them a launch gets. A new engine is a file of its own and a row here."""

from collections.abc import Callable

from relora.config import Config
from relora.engines.base import Engine
from relora.engines.ddp import DDPEngine, OneProcessEngine
from relora.engines.deepspeed import DeepSpeedEngine
from relora.engines.fsdp2 import FSDP2Engine
from relora.engines.local_sgd import LocalSGDEngine
from relora.engines.world import World, collective_timeout, launched_engine
from relora.method.registry import resolve
from relora.model.tasks import Task, task_of

# A function (config, world, task) -> Engine each; so is one that `training.engine` names by module:attribute.
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
        UserError: the processes are not those that the launch promises.
    """
    launched = launched_engine()
    timeout = collective_timeout(config.training.timeout_minutes)
    world = World(wanted=config.training.num_processes, group_of_one=launched != "ddp", timeout=timeout)
    name: str = launched
    if config.training.engine != "auto":
        name = config.training.engine
    elif launched == "ddp" and config.relora.sync == "restart":
        name = "local sgd"
    elif launched == "ddp" and world.num_processes == 1:
        name = "one process"
    return resolve("training.engine", name, ENGINES)(config, world, task_of(config))
