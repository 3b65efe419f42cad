"""Where the weights of a stage come from when they are not on disk: rank 0, or the stage before."""

from collections.abc import Set

from torch import Tensor, nn
from transformers import PretrainedConfig

from relora.config import Config
from relora.method.names import named_parameters
from relora.method.store import Store
from relora.model import build_model, skeleton
from relora.runtime.engines.processes import Processes
from relora.runtime.rebuild import persistent_buffers
from relora.runtime.state import Held


class FromFirst(Held):
    """Weights that rank 0 holds in memory; taking one sends it to all."""

    def __init__(self, tensors: dict[str, Tensor], processes: Processes) -> None:
        super().__init__(tensors)
        self.processes = processes

    def take(self, name: str) -> Tensor:
        return self.processes.from_rank(super().take(name), 0)


class Handover:
    """The weights of a stage that has ended, each let go of once the next stage has it."""

    def __init__(self, model: nn.Module, store: Store) -> None:
        self.store = store
        self.parameters = named_parameters(model)
        self.buffers = persistent_buffers(model)

    @property
    def names(self) -> Set[str]:
        return self.parameters.keys() | self.buffers.keys()

    def take(self, name: str) -> Tensor:
        return self.buffers.pop(name) if name in self.buffers else self.store.read(self.parameters.pop(name))


def first_weights(config: Config, hf_config: PretrainedConfig, processes: Processes) -> FromFirst:
    """The weights that a run begins with, drawn or downloaded by rank 0 alone."""
    if processes.rank == 0:
        model = build_model(config.model, hf_config, seed=config.seed)
    else:
        model = skeleton(config.model, hf_config)
    tensors = {name: parameter.detach() for name, parameter in named_parameters(model).items()}
    return FromFirst(tensors | persistent_buffers(model), processes)
