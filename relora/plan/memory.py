"""Memory of one process by component, for one stage: what is always there, and what is added at the peaks."""

import math
from dataclasses import dataclass

from transformers import PretrainedConfig

from relora.config import Config
from relora.config.derived import lora_config
from relora.method.census import Census, census
from relora.plan.rehearsal import History, Rehearsal, fake, fake_model
from relora.plan.sharing import Launch, Parts, Sharing, parts, sharing
from relora.stages import Stage


@dataclass(frozen=True)
class StageModel:
    """The parameters of a stage: their census, their bytes, and those of the largest tensor and of all buffers."""

    census: Census
    parts: Parts
    largest_tensor: int
    num_buffer_bytes: int


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process.

    Attributes:
        stage: warm_start or relora.
        device: at the peak of an update, by component; their sum is that peak.
        host: in host memory all the time, by component. Without a GPU it is the same memory.
        restart: peak of a restart on the device, or None where there are none.
        save: peak of a checkpoint on the device.
        save_host: what a checkpoint takes on the host.
    """

    stage: str
    device: dict[str, int]
    host: dict[str, int]
    restart: int | None
    save: int
    save_host: int

    @property
    def update(self) -> int:
        return sum(self.device.values())

    @property
    def peak(self) -> int:
        return max(self.update, self.restart or 0, self.save)


def stage_model(stage: Stage, config: Config, hf_config: PretrainedConfig) -> StageModel:
    """The parameters that a stage has."""
    with fake():
        model = fake_model(stage, config, hf_config)
        counted = census(model)
        return StageModel(
            census=counted,
            parts=parts(model, factors=counted.factors.num_bytes),
            largest_tensor=max(p.nbytes for p in model.parameters()),
            num_buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        )


def assemble(stage: Stage, config: Config, launch: Launch, model: StageModel, rehearsed: Rehearsal) -> StageMemory:
    """The memory of one process, from the whole that was rehearsed and the share that the engine leaves it."""
    shares = sharing(launch, config, model.parts)
    kept = _kept(model, rehearsed, shares)
    level = sum(kept.values())
    merges = stage.is_low_rank and config.training.method == "relora" and config.relora.restart_every is not None
    is_sharded = shares.weights < 1
    return StageMemory(
        stage=stage.name,
        device=kept | _at_peak(rehearsed, shares, trained=model.parts.trained),
        host=_host(stage, config, model.census, launch),
        restart=level + math.ceil(rehearsed.merge * shares.weights) if merges else None,
        save=level + (model.largest_tensor if is_sharded else 0),
        save_host=model.largest_tensor if launch.on_gpu else 0,
    )


def _kept(model: StageModel, rehearsed: Rehearsal, shares: Sharing) -> dict[str, int]:
    """What is there between updates."""
    counted = model.census
    weights = {
        "base weights": counted.wrapped,
        "LoRA factors": counted.factors,
        "trained in full": counted.full,
        "frozen for good": counted.frozen,
    }
    return {kind: math.ceil(group.num_bytes * shares.weights) for kind, group in weights.items()} | {
        "buffers of the model": model.num_buffer_bytes,
        "fp32 copies of what is trained (ZeRO)": shares.masters,
        "optimizer state": math.ceil(rehearsed.optimizer_state * shares.optimizer),
        "buffers of the engine": shares.buffers,
    }


def _at_peak(rehearsed: Rehearsal, shares: Sharing, *, trained: int) -> dict[str, int]:
    """What the costliest moment of an update adds: in the passes, or in the optimizer's step."""
    other, gradients = _costliest(rehearsed.passes, shares, trained=trained)
    step, whole = math.ceil(rehearsed.step_temporaries * shares.optimizer), math.ceil(trained * shares.gradients)
    if step + whole > other + gradients:
        return {"gradients": whole, "activations": 0, "logits, loss, temporaries": step}
    activations = min(rehearsed.activations, other)
    return {"gradients": gradients, "activations": activations, "logits, loss, temporaries": other - activations}


def _costliest(passes: History, shares: Sharing, *, trained: int) -> tuple[int, int]:
    """(everything else, gradients) of one process when they are most."""
    held = [(other, math.ceil(shares.gradients * (trained if shares.gradients_stay else g))) for other, g in passes]
    return max(held, key=sum)


def _host(stage: Stage, config: Config, counted: Census, launch: Launch) -> dict[str, int]:
    """The exact fp32 master beside a coarser base, each process with its part."""
    is_coarse = stage.is_low_rank and lora_config(config).base_dtype not in (None, "float32")
    numbers = sum(d_out * d_in for d_out, d_in in counted.wrapped_layers.values())
    num_shares = 1 if config.relora.sync == "restart" else launch.num_processes
    where = ", mapped from disk" if config.lora.master == "disk" else ""
    return {f"exact fp32 master{where}": math.ceil(4 * numbers / num_shares)} if is_coarse else {}
