"""The exact fp32 masters of frozen weights that are stored on a coarser grid.

They are touched at restarts only, so they rest in host memory, or in files that the system maps into it, each process
with a share. Files have no name once they are mapped: a process that is killed leaves none behind, and a run that goes
on makes them anew from its checkpoint.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from relora.engines import Engine
from relora.method.lora import LoRALinear, lora_layers
from relora.method.store import Shard


def place_masters(model: nn.Module, engine: Engine, *, folder: Path | None) -> None:
    """Give each process its share of the masters, without values yet; the engine's store then knows them.

    Args:
        folder: map them from files on the disk of this folder; None for plain memory.

    Raises:
        OSError: the disk is full.
    """
    layers = lora_layers(model)
    engine.store.register(layers.values())
    for layer in layers.values():
        if layer.master is not None:
            start, numel = _share(engine, layer)
            is_partial = engine.world.num_processes > 1 and not engine.is_apart
            layer.master = Shard(memory_of(numel, folder), start, is_partial=is_partial)


@contextmanager
def exact_weights(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Forward passes compute with the masters, of which one layer at a time is whole on the device. Collective."""
    layers = [layer for layer in lora_layers(model).values() if layer.master is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(partial(_bring, engine)).remove)
            stack.callback(layer.register_forward_hook(_drop, always_call=True).remove)
        yield


def _bring(engine: Engine, layer: LoRALinear, _: object) -> None:
    assert layer.master is not None
    shape, master = torch.Size(layer.weight_format.shape), layer.master
    whole = engine.store.gather(shape, master) if master.is_partial else master.values.view(shape)
    layer.override = whole.to(engine.world.device)


def _drop(layer: LoRALinear, *_: object) -> None:
    layer.override = None


def _share(engine: Engine, layer: LoRALinear) -> tuple[int, int]:
    """First entry and number of entries of W whose master is kept here. Processes that train apart keep all."""
    numel, processes = engine.store.shape(layer.weight).numel(), engine.world
    if engine.is_apart:
        return 0, numel
    size = -(-numel // processes.num_processes)
    start = min(processes.process_index * size, numel)
    return start, min(size, numel - start)


def memory_of(numel: int, folder: Path | None) -> Tensor:
    """float32 numbers without values, in memory or mapped from a file in `folder` that has no name any more."""
    if folder is None or numel == 0:
        return torch.empty(numel, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".master-") as file:
        # Reserved now: a mapped page for which the disk has no room would kill the process later, without a word.
        os.posix_fallocate(file.fileno(), 0, 4 * numel)
        return torch.from_file(file.name, shared=True, size=numel, dtype=torch.float32)
