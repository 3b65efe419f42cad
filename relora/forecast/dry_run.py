"""One update of a stage, and a merge, made by the engine's own code with tensors that have no values.

torch's FakeTensorMode gives every tensor its shape, dtype and life, and no memory. So what is counted is what the
model really keeps, whatever its architecture: autocast, checkpointing, masks and the loss included.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from relora.config import Config, ModelSection, UserError
from relora.engines import TrainState, World
from relora.engines.ddp import DDPEngine
from relora.method.kernels import GPU_LAYOUT, layout
from relora.method.lora import lora_layers
from relora.method.merge import merge_layer
from relora.method.store import TorchStore
from relora.model.model import empty_model, refusal
from relora.train.stages import Stage, make_trainable, optimizer_for


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with FakeTensorMode(), LiveBytes() as live:` counts the bytes of the storages made and still alive.

    Fake tensors have no values, but for a few constants: any other number that the program asks one for is 0.

    Attributes:
        now: bytes alive, without those that were claimed.
        gradients: bytes alive of what was claimed as gradients.
        history: (now, gradients) whenever something had been made; `restart` empties it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.gradients = 0, 0
        self.history: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._claimed: set[int] = set()

    def restart(self) -> None:
        """Begin a new history, at what is alive now."""
        self.history = [(self.now, self.gradients)]

    def claim(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these as gradients from now on; those that already are stay so."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._sizes and key not in self._claimed:
                self._claimed.add(key)
                self.now -= self._sizes[key]
                self.gradients += self._sizes[key]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = function(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if function.name() != "aten::_local_scalar_dense":
                raise
            return 0.0 if args[0].is_floating_point() else 0
        leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if sum(self._is_new(tensor) for tensor in made):
            self.history.append((self.now, self.gradients))
        return result

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._died, key)
        return True

    def _died(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._claimed:
            self._claimed.remove(key)
            self.gradients -= size
        else:
            self.now -= size


History = list[tuple[int, int]]


@dataclass(frozen=True)
class Rehearsal:
    """What one process holds beside weights and moments, in bytes.

    Attributes:
        activations: kept for the backward pass when the output head begins.
        passes: (everything else, gradients) at every growth during forward and backward pass.
        step: (everything else, gradients) during clipping and the optimizer's step, new moments included.
        optimizer_state: what the optimizer keeps.
        merge: temporaries of the costliest merge; 0 where nothing is merged.
    """

    activations: int
    passes: History
    step: History
    optimizer_state: int
    merge: int

    @property
    def step_temporaries(self) -> int:
        return max(0, max(other for other, _ in self.step) - self.optimizer_state)


@contextmanager
def fake() -> Iterator[LiveBytes]:
    """Tensors made within have shapes and lives, but neither values nor memory."""
    with FakeTensorMode(), LiveBytes() as live:
        yield live


def fake_model(stage: Stage, config: Config, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model of a stage, as a run builds it. Call within `fake`."""
    model = empty_model(kernel_known_here(config.model), hf_config)
    make_trainable(model, stage, config)
    return model


def kernel_known_here(section: ModelSection) -> ModelSection:
    """Attention kernels that only GPUs have keep what sdpa keeps: their inputs, the output, a number a row."""
    known = section.attn_implementation in ("eager", "sdpa")
    return section if known else section.model_copy(update={"attn_implementation": "sdpa"})


def rehearse(
    stage: Stage, config: Config, hf_config: PretrainedConfig, *, batch_size: int, on_gpu: bool = False
) -> Rehearsal:
    """One micro-batch of `batch_size` samples and one step of the optimizer, in one process.

    Args:
        on_gpu: whether torch's AdamW takes all parameters at once, and W + delta is formed in one piece, as there.

    Raises:
        UserError: the model cannot compute without values: torch knows no shapes for one of its operations.
    """
    with fake() as live, layout(GPU_LAYOUT) if on_gpu else nullcontext():
        model = fake_model(stage, config, hf_config)
        engine = DDPEngine(
            cast(World, OneProcess()),
            mixed_precision=config.training.mixed_precision,
            max_grad_norm=config.optim.max_grad_norm,
        )
        trained = TrainState(model=model, wrapped=model, optimizer=_optimizer(model, config, on_gpu=on_gpu))
        seen = _Seen(live, trained)
        level = live.now
        live.restart()
        _update(engine, trained, config, batch_size)
        step, state = live.history, optimizer_state_bytes(trained.optimizer)
        merge = merge_temporaries(model, live)
    return Rehearsal(
        activations=seen.activations - level,
        passes=_above(seen.passes, level),
        step=_above(step, level),
        optimizer_state=state,
        merge=merge,
    )


@contextmanager
def rows_as_told(*, masked: bool) -> Iterator[None]:
    """Let transformers know whether rows hold several documents, which it would read from values.

    Without values it takes them to, and makes a mask of batch x sequence^2 that each layer keeps a copy of.
    """
    told = nullcontext() if masked else patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None)
    with told:
        yield


def fake_batch(config: Config, batch_size: int) -> dict[str, Tensor]:
    """A micro-batch of the form that the data have. Call within `fake`."""
    ids = torch.zeros(batch_size, config.data.sequence_length, dtype=torch.long)
    positions = {"position_ids": ids.clone()} if config.data.document_mask else {}
    return {"input_ids": ids, "labels": ids.clone(), **positions}


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """What the optimizer keeps, of all parameters."""
    held = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def merge_temporaries(model: nn.Module, live: LiveBytes) -> int:
    """Bytes that the merge of the largest layer needs for a while; 0 where nothing is merged. Call within `fake`."""
    layers = lora_layers(model).values()
    largest = max(layers, key=lambda layer: layer.in_features * layer.out_features, default=None)
    if largest is None:
        return 0
    store = TorchStore()
    store.register([largest])
    live.restart()
    level = live.now
    merge_layer(largest, store)
    return max(other for other, _ in live.history) - level


@dataclass(frozen=True)
class OneProcess:
    """What an engine asks of `Processes`, where there is one process and nothing travels."""

    num_processes: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over one process."""


class _Seen:
    """Notes, by hooks, what is alive at the turns of an update."""

    def __init__(self, live: LiveBytes, trained: TrainState) -> None:
        self.activations = 0
        self.passes: History = []
        self._live = live
        model = cast(PreTrainedModel, trained.model)
        # Some models have no head that could be told from the rest: the logits then count as activations.
        body_ends = model.get_output_embeddings()
        if isinstance(body_ends, nn.Module):
            body_ends.register_forward_pre_hook(lambda *_: self._note_activations())
        else:
            model.register_forward_hook(lambda *_: self._note_activations())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note_gradient)
        trained.optimizer.register_step_pre_hook(lambda *_: self._note_step())

    def _note_activations(self) -> None:
        self.activations = self.activations or self._live.now

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._live.claim([parameter.grad])

    def _note_step(self) -> None:
        self.passes = self._live.history
        self._live.restart()


def _update(engine: DDPEngine, trained: TrainState, config: Config, batch_size: int) -> None:
    try:
        with rows_as_told(masked=config.data.document_mask):
            engine.update(trained, [fake_batch(config, batch_size)], seeds=[0], stop=False)
    except RuntimeError as error:
        name = type(trained.model).__name__
        raise UserError([f"model: {name} cannot be tried out without values: {refusal(error)}"]) from None


def _above(history: History, level: int) -> History:
    return [(other - level, gradients) for other, gradients in history]


def _optimizer(model: nn.Module, config: Config, *, on_gpu: bool) -> Optimizer:
    optimizer = optimizer_for(model, config)
    for group in optimizer.param_groups:
        if on_gpu and not group.get("fused", True):
            group["foreach"] = True
    return optimizer
