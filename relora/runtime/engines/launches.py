"""What the launcher has started: its environment, read before any process group exists."""

import os
from typing import Literal

from relora.config import UserError

EngineKind = Literal["local", "fsdp2", "deepspeed"]


def launched_world_size() -> int:
    """Number of processes that the launcher says it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The place of this process among them."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is rank 0 of the launch: it alone writes the run folder, and talks."""
    return launched_rank() == 0


def is_first_on_node() -> bool:
    """Whether this process does the work that is done once a node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launched_engine() -> EngineKind:
    """The engine that the launcher asks for."""
    if _is_set("ACCELERATE_USE_FSDP"):
        return "fsdp2"
    return "deepspeed" if _is_set("ACCELERATE_USE_DEEPSPEED") else "local"


def check_world(world_size: int, num_processes: int | None) -> None:
    """Raise UserError if processes would train independent copies, or are not as many as the run wants."""
    launched, problems = launched_world_size(), []
    if launched != world_size:
        problems.append(
            f"the launcher started {launched} processes but the engine sees {world_size}: "
            "they would train independent copies of the model"
        )
    if num_processes is not None and num_processes != launched:
        problems.append(f"training.num_processes = {num_processes}: the launcher started {launched}")
    if problems:
        raise UserError(problems)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
