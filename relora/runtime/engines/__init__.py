"""The only files that know accelerate."""

from relora.config import Config
from relora.runtime.engines.base import (
    Batch,
    Engine,
    Live,
    Update,
    is_first,
    is_first_on_node,
    launched_world_size,
    refused_launches,
)
from relora.runtime.engines.local import LocalEngine

__all__ = [
    "Batch",
    "Engine",
    "Live",
    "Update",
    "connect",
    "is_first",
    "is_first_on_node",
    "launched_world_size",
    "refused_launches",
]


def connect(config: Config) -> Engine:
    """Join the processes of this launch. Raises UserError when they are not what the launch promises."""
    training = config.training
    return LocalEngine(mixed_precision=training.mixed_precision, num_processes=training.num_processes)
