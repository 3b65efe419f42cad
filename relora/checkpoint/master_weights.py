"""Exact fp32 masters of frozen weights that are stored in bf16, int8 or nf4.

They are touched at restarts only, so they live in host memory, or in mapped files, each process with a shard. The files
have no name once they are mapped: a process that is killed leaves none behind, and a resumed run rebuilds them
from its checkpoint.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.engines import Engine
from relora.method.lora import LoRALinear, lora_layers
from relora.method.store import Shard


def place_masters(model: nn.Module, engine: Engine, *, folder: Path | None) -> None:
    """Give each process its shard of the masters, without values yet; the engine's store then knows them.

    Where processes train separately each holds whole masters.

    Args:
        folder: map them from files on the disk of this folder; None for plain memory.

    Raises:
        OSError: the disk is full.
    """
    layers, world = lora_layers(model), engine.world
    engine.store.register(layers.values())
    is_partial = engine.splits_masters and world.num_processes > 1
    for layer in layers.values():
        if layer.master is not None:
            start, size = 0, engine.store.shape(layer.weight).numel()
            if is_partial:
                # 10 entries on 4 processes: 3 + 3 + 3 + 1
                numel, most = size, -(-size // world.num_processes)
                start = min(world.process_index * most, numel)
                size = min(most, numel - start)
            layer.master = Shard(memory_of(size, folder), start, is_partial=is_partial)


@contextmanager
def exact_weights(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Forward passes compute with the masters, of which one layer at a time is gathered on the device. Collective."""

    def gather(layer: LoRALinear, _: object) -> None:
        assert layer.master is not None
        shape, master = torch.Size(layer.weight_format.shape), layer.master
        full = engine.store.gather(shape, master) if master.is_partial else master.values.view(shape)
        layer.override = full.to(engine.world.device)

    def release(layer: LoRALinear, *_: object) -> None:
        layer.override = None

    layers = [layer for layer in lora_layers(model).values() if layer.master is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(gather).remove)
            stack.callback(layer.register_forward_hook(release, always_call=True).remove)
        yield


def memory_of(numel: int, folder: Path | None) -> Tensor:
    """float32 numbers without values, in memory or mapped from an unnamed file in `folder`."""
    if folder is None or numel == 0:
        return torch.empty(numel, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".master-") as file:
        # Reserved now: writing to a mapped page that finds no room on the disk would kill the process silently.
        os.posix_fallocate(file.fileno(), 0, 4 * numel)
        return torch.from_file(file.name, shared=True, size=numel, dtype=torch.float32)
