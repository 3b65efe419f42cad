"""Engines: ways to spread training over processes. The only files that know accelerate, DeepSpeed or FSDP."""

from relora.engines.base import Engine, TrainState, Update
from relora.engines.launch_checks import problems
from relora.engines.local_sgd import resume_problems
from relora.engines.registry import ENGINES, connect
from relora.engines.world import (
    World,
    is_first,
    is_first_on_node,
    launched_engine,
    launched_num_processes,
    launched_process_index,
)

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
