"""Local SGD between restarts (`relora.sync: restart`): processes train factors of their own and meet at restarts.

No gradients are exchanged in between. At a restart W takes the mean of all processes' updates, of rank up to
num_processes * r, everything that trains in full is averaged too, and each process draws new factors under a key of its
own, so that their subspaces differ. LoRA-the-Explorer, arXiv 2402.16828; the outer optimizer is DiLoCo's, arXiv
2311.08105, Algorithm 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from relora.config import Config
from relora.config.derived import reinit_policy, schedule_of
from relora.engines.base import TrainState
from relora.engines.ddp import DDPEngine
from relora.engines.state_entry import Entry, state_prefix
from relora.engines.world import World
from relora.method.lora import factor_names, lora_layers
from relora.method.names import named_parameters
from relora.method.reinit import Kaiming, Reinit
from relora.method.restart import start_factors
from relora.method.store import Store, TorchStore
from relora.model.tasks import Task


@dataclass
class OuterOptimizer:
    """SGD with Nesterov momentum, as torch's, over named tensors, whose gradient is the mean update of a cycle.

    Attributes:
        velocity: by name; empty without momentum.
        anchors: values at the start of the cycle, by name, of fully trained parameters; empty if `is_plain_mean`.
    """

    learning_rate: float = 1.0
    momentum: float = 0.0
    velocity: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_plain_mean(self) -> bool:
        """Whether the result is simply the mean."""
        return self.learning_rate == 1 and self.momentum == 0

    def step(self, name: str, delta: Tensor) -> Tensor:
        """The update to apply for the mean update `delta` of the tensor `name`."""
        if self.is_plain_mean:
            return delta
        if self.momentum == 0:
            return delta * self.learning_rate
        # A resume may have left it on another device: the delta of a weight with a master is formed where that lies.
        velocity = self.velocity.get(name, torch.zeros_like(delta)).to(delta.device).mul_(self.momentum).add_(delta)
        self.velocity[name] = velocity
        return (delta + self.momentum * velocity) * self.learning_rate

    def anchor(self, name: str, values: Tensor) -> None:
        """Remember the values at the start of a cycle, if they will be needed."""
        if not self.is_plain_mean:
            self.anchors[name] = values.detach().clone()

    def combine(self, name: str, mean: Tensor) -> Tensor:
        """The values from which every process continues, given the mean of theirs."""
        if self.is_plain_mean:
            return mean
        anchor = self.anchors[name].to(mean.device)
        return anchor + self.step(name, mean - anchor)

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint: `velocity/<name>` and `anchor/<name>`."""
        kinds = {"velocity": self.velocity, "anchor": self.anchors}
        return {f"{kind}/{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}

    def load(self, key: str, tensor: Tensor) -> None:
        """Put back one tensor of `tensors()`."""
        kind, _, name = key.partition("/")
        {"velocity": self.velocity, "anchor": self.anchors}[kind][name] = tensor


class LocalSGDEngine(DDPEngine):
    """DDP while every parameter is trained in full; no gradients are exchanged once the model has factors."""

    def __init__(
        self, world: World, task: Task, *, mixed_precision: str, max_grad_norm: float | None, outer: OuterOptimizer
    ) -> None:
        super().__init__(world, task, mixed_precision=mixed_precision, max_grad_norm=max_grad_norm)
        self.name += ", separate factors between restarts"
        self.draw_index, self._outer = world.process_index, outer
        self._seed = 0
        self._reinit: Reinit = Kaiming()

    @classmethod
    def from_config(cls, config: Config, world: World, task: Task) -> "LocalSGDEngine":
        relora = config.relora
        engine = cls(
            world,
            task,
            mixed_precision=config.training.mixed_precision,
            max_grad_norm=config.optim.max_grad_norm,
            outer=OuterOptimizer(relora.outer_learning_rate, relora.outer_momentum),
        )
        engine._seed, engine._reinit = config.seed, reinit_policy(config)
        return engine

    def prepare(self, model: nn.Module, build_optimizer: Callable[[nn.Module], Optimizer]) -> TrainState:
        trains_separately = bool(lora_layers(model))
        self.num_states = self.world.num_processes if trains_separately else 1
        self.splits_masters = self.reduces_gradients = not trains_separately
        return super().prepare(model, build_optimizer)

    def parallelize(self, model: nn.Module) -> nn.Module:
        return model if self.num_states > 1 else super().parallelize(model)

    def begin(self, state: TrainState, extra: Mapping[str, Tensor], *, cycle: int, draw_index: int) -> None:
        # A run that goes back to a checkpoint begins again in the same process.
        self._outer.velocity.clear()
        self._outer.anchors.clear()
        for key, tensor in extra.items():
            self._outer.load(key, tensor)
        if self.reduces_gradients:
            return
        if draw_index != self.draw_index:
            # This process did not exist when the checkpoint was written (at a restart or the switch), so it loaded
            # another process's factors: draw its own.
            start_factors(
                state.model,
                seed=self._seed,
                index=cycle,
                reinit=self._reinit,
                store=self.store,
                draw_index=self.draw_index,
            )
        if not extra:
            for name, parameter in _trained_in_full(state.model).items():
                self._outer.anchor(name, parameter)

    def extra_state(self) -> dict[str, Tensor]:
        return self._outer.tensors()

    def trained_entries(self, entries: Sequence[Entry]) -> list[Entry]:
        def fetch(entry: Entry, index: int) -> Tensor:
            return self.world.broadcast(entry.fetch(), index)

        return [
            replace(entry, name=state_prefix(index) + entry.name, fetch=partial(fetch, entry, index))
            for index in range(self.num_states)
            for entry in entries
        ]

    def synchronize(self, state: TrainState) -> None:
        for name, parameter in _trained_in_full(state.model).items():
            mean = parameter.detach() / self.world.num_processes
            self.world.all_reduce(mean)
            self.store.write(parameter, self._outer.combine(name, mean))
            self._outer.anchor(name, parameter)
        super().synchronize(state)

    def restart_store(self, state: TrainState) -> Store:
        return MeanStore(self.world, {id(layer.lora_A) for layer in lora_layers(state.model).values()})

    def transform_delta(self, name: str, delta: Tensor) -> Tensor:
        return self._outer.step(name, delta)

    def replicas(self, state: TrainState) -> dict[str, Tensor]:
        factors = factor_names(state.model)
        return {name: values for name, values in super().replicas(state).items() if name not in factors}


class MeanStore(TorchStore):
    """Reads the factors of all n processes side by side: B_all @ A_all is then the mean of their B @ A.

    A_all (n r, d_in) stacks the A's, B_all (d_out, n r) is the B's next to each other, divided by n.

    Args:
        ids_of_A: ids of the parameters to be stacked; all other trained ones are B's.
    """

    def __init__(self, world: World, ids_of_A: set[int]) -> None:
        super().__init__()
        self._world, self._ids_of_A = world, ids_of_A

    def read(self, parameter: nn.Parameter) -> Tensor:
        n = self._world.num_processes
        if not parameter.requires_grad or n == 1:
            return super().read(parameter)
        own = parameter.detach().contiguous()
        factors = [torch.empty_like(own) for _ in range(n)]
        distributed.all_gather(factors, own)
        return torch.cat(factors) if id(parameter) in self._ids_of_A else torch.cat(factors, dim=1) / n


def launch_problems(config: Config, engine: str) -> list[str]:
    """Message if the processes of this launch cannot train separately."""
    if config.relora.sync == "restart" and engine != "ddp":
        return ["relora.sync = restart: needs DDP, in which every process holds its own whole model"]
    return []


def resume_problems(config: Config, step: int, num_states: int, num_processes: int) -> list[str]:
    """Message if a checkpoint cannot be resumed by so many processes.

    Between two restarts processes that train separately must be as many as they were.

    Args:
        num_states: number of processes that had trained parameters of their own when it was written.
    """
    schedule = schedule_of(config)
    trains_separately = config.relora.sync == "restart" and schedule.stage(step) == "low_rank"
    at_restart = step == schedule.warm_start_steps or schedule.restart_due(step)
    if not trains_separately or at_restart or num_states == num_processes:
        return []
    return [
        f"relora.sync = restart: the checkpoint at step {step} holds the separate states of {num_states} processes, "
        f"but the launcher started {num_processes}; use {num_states} processes until the next restart"
    ]


def _trained_in_full(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters that are not factors, by canonical name."""
    factors = factor_names(model)
    return {name: p for name, p in named_parameters(model).items() if p.requires_grad and name not in factors}
