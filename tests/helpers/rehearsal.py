"""A run of each engine on the stand-in for a GPU, in one process, and what the host waited for on the way."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch import distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM

from relora import LoRAConfig, build_optimizer, inject_lora
from relora.config import check
from relora.engines.base import Engine
from relora.engines.ddp import DDPEngine, OneProcessEngine
from relora.engines.local_sgd import LocalSGDEngine
from relora.engines.world import World
from relora.model.tasks import CausalLM
from relora.tracking.communication import Traffic
from relora.train import callbacks
from relora.train.loop import Loop
from relora.train.train import train
from tests.helpers.standin import NAME, STANDIN, StandIn, Wait, register
from tests.helpers.tiny import MODEL, metrics, stopped

# Fewer tokens of text, fewer rows of a probe: every operator costs 0.1 ms.
SHORT = {"SAMPLE_TOKENS": 2, "NUM_PROBE_ROWS": 2}


@dataclass
class Rehearsal:
    """What a run on the stand-in came to.

    Attributes:
        lines, resumed_lines: the metrics of the run, and of its copy that was stopped and resumed.
        in_updates: for each update of the run, the waits of the threads that compute it.
        between: the waits of the loop between updates, the callbacks apart.
        bytes_sent: in each update, as counted for two processes.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    resumed_lines: list[dict[str, Any]] = field(default_factory=list)
    in_updates: list[list[Wait]] = field(default_factory=list)
    between: list[Wait] = field(default_factory=list)
    bytes_sent: list[float] = field(default_factory=list)


def rehearse(engine: str, tree: dict[str, Any], resume_step: int) -> Rehearsal:
    """Train on the stand-in, then resume a copy of the run. For a process of its own."""
    join(engine, tree)
    found = Rehearsal()
    with watched(found, counts_bytes=engine == "ddp"):
        train(check(tree))
    found.lines = metrics(tree["output_dir"])
    copy = stopped(tree, resume_step, Path(tree["output_dir"] + "-resumed"))
    train(check(copy))
    found.resumed_lines = metrics(copy["output_dir"])
    return found


def join(engine: str, tree: dict[str, Any]) -> None:
    """Make this process the only one of a launch whose device is the stand-in, under the engine of a launch file."""
    register()
    torch.compiler.set_stance("force_eager")  # of bitsandbytes, whose kernels for other devices compile themselves
    for name, value in SHORT.items():
        setattr(callbacks, name, value)
    place = World.__init__

    def on_the_standin(world: World, **options: Any) -> None:
        if engine != "one process" and not distributed.is_initialized():
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        place(world, **options)
        world.device = STANDIN.device

    World.__init__ = on_the_standin  # type: ignore[method-assign]
    PartialState.destroy_process_group = lambda *_: None  # DeepSpeed holds on to the groups of its first run
    if engine == "one process":
        return
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    if engine == "fsdp2 offload":
        launched["FSDP_OFFLOAD_PARAMS"] = "true"
    if engine.startswith("zero"):
        launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": engine.removeprefix("zero")}
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
        set_deepspeed_accelerator()
    if engine in ("ddp", "local sgd"):
        tree["training"]["engine"] = f"tests.helpers.rehearsal:{engine.replace(' ', '_')}"
    else:
        os.environ |= launched


class DDPOfOne(DDPEngine):
    """DDP's own module around the model, though there is nobody to exchange gradients with."""

    def parallelize(self, model: nn.Module) -> nn.Module:
        with patch.object(self.world, "num_processes", 2):
            return super().parallelize(model)


ddp, local_sgd = DDPOfOne.from_config, LocalSGDEngine.from_config


def try_faults(faults: dict[str, Callable[[Engine], Any]]) -> dict[str, tuple[str, set[str]]]:
    """What an update with each fault comes to: the error, and the waits. For a process of its own.

    Args:
        faults: by name, a context manager that puts the fault into an engine.
    """
    join("one process", {})
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"}))
    inject_lora(model, LoRAConfig(r=4, lora_alpha=8), seed=0)
    engine = OneProcessEngine(World(wanted=None), CausalLM(), mixed_precision="bf16", max_grad_norm=1.0)
    live = engine.prepare(model, lambda prepared: build_optimizer(prepared, name="adamw_fused", learning_rate=1e-2))
    ids = torch.arange(32).view(2, 16)
    batch, found = {"input_ids": ids.pin_memory(), "labels": ids.pin_memory()}, {}
    for name, fault in faults.items():
        start, error = len(STANDIN.waits), ""
        try:
            with fault(engine):
                engine.update(live, [batch], seeds=[0], stop=False)
        except RuntimeError as raised:
            error = str(raised)
        found[name] = (error, {wait.what for wait in STANDIN.waits[start:] if "transformers" not in wait.place})
        live.optimizer.zero_grad()
    return found


@contextlib.contextmanager
def watched(found: Rehearsal, *, counts_bytes: bool) -> Any:
    """Fill the waits and bytes of `found` from the updates and loops within."""
    update, run, call = Loop.update, Loop.run, callbacks.Callbacks.__call__

    def waits_of(target: list[Wait], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = len(STANDIN.waits)
        result = function(*args, **kwargs)
        target += [wait for wait in STANDIN.waits[start:] if wait.thread == "MainThread" or "Dummy" in wait.thread]
        return result

    def watched_update(*args: Any) -> Any:
        found.in_updates.append([])
        if not counts_bytes:
            return waits_of(found.in_updates[-1], update, *args)
        with Traffic(2) as traffic:
            result = waits_of(found.in_updates[-1], update, *args)
        found.bytes_sent.append(traffic.bytes_sent)
        return result

    def watched_callbacks(*args: Any, **kwargs: Any) -> Any:
        elsewhere: list[Wait] = []
        result = waits_of(elsewhere, call, *args, **kwargs)
        accounted.extend(elsewhere)
        return result

    def watched_run(*args: Any, **kwargs: Any) -> Any:
        accounted.clear()
        number, every = len(found.in_updates), list[Wait]()
        result = waits_of(every, run, *args, **kwargs)
        known = {id(wait) for wait in [*accounted, *(w for waits in found.in_updates[number:] for w in waits)]}
        found.between += [wait for wait in every if id(wait) not in known]
        return result

    accounted: list[Wait] = []
    with (
        patch.object(Loop, "update", watched_update),
        patch.object(Loop, "run", watched_run),
        patch.object(callbacks.Callbacks, "__call__", watched_callbacks),
    ):
        yield


def set_deepspeed_accelerator() -> None:
    """Tell DeepSpeed of the stand-in, which it drives as it drives a GPU: asynchronously, in streams."""
    from deepspeed.accelerator import cpu_accelerator, set_accelerator

    class Accelerator(cpu_accelerator.CPU_Accelerator):  # type: ignore[misc]
        Stream = Event = StandIn.Stream
        device_count, synchronize = STANDIN.device_count, STANDIN.synchronize
        current_device, stream, current_stream = STANDIN.current_device, STANDIN.stream, STANDIN.current_stream
        default_stream = current_stream

        def is_synchronized_device(self) -> bool:
            return False

        def device_name(self, device_index: int | None = None) -> str:
            return NAME if device_index is None else f"{NAME}:{device_index}"

        def current_device_name(self) -> str:
            return self.device_name(0)

        def default_generator(self, device_index: int) -> torch.Generator:  # noqa: ARG002
            return STANDIN.generator

        def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return tensor.pin_memory()

        def on_accelerator(self, tensor: torch.Tensor) -> bool:
            return tensor.device.type == NAME

    set_accelerator(Accelerator())
