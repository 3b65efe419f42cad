"""One update of a stage, and one merge, by the engine's own code with tensors that have no values.

torch's FakeTensorMode gives every tensor its shape, dtype and lifetime, and no memory. So the forecast counts what the
model really allocates, whatever its architecture: autocast, checkpointing, masks and the loss included.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from relora.config import Config, ModelSection, UserError
from relora.data.batches import NO_TOKENS, Batch
from relora.engines import TrainState, World
from relora.engines.base import restrict_layers
from relora.engines.ddp import OneProcessEngine
from relora.method.kernels import CPU_LAYOUT, GPU_LAYOUT, layout
from relora.method.lora import lora_layers
from relora.method.merge import merge_layer
from relora.method.store import TorchStore
from relora.model.model import empty_model, first_lines
from relora.model.tasks import task_of
from relora.train.stages import Stage, make_trainable, optimizer_for


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within `with FakeTensorMode(), LiveBytes() as live:` counts the bytes of the storages that are alive.

    Storages that existed before do not count. Fake tensors have no values, but for a few constants: any other number
    that the program reads from one is 0.

    Attributes:
        now: bytes alive, without those of gradients.
        gradients: bytes alive of the storages given to `mark_gradients`.
        history: (now, gradients) after each allocation since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.gradients = 0, 0
        self.history: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}  # by the address of the storage
        self._marked: set[int] = set()

    def restart(self) -> int:
        """Begin a new history at what is alive now, and return `now`."""
        self.history = [(self.now, self.gradients)]
        return self.now

    def mark_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these as gradients from now on, each once."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._sizes and key not in self._marked:
                self._marked.add(key)
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
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if sum(self._add(tensor) for tensor in tensors):
            self.history.append((self.now, self.gradients))
        return result

    def _add(self, tensor: Tensor) -> bool:
        """Count the storage of an operation's result, until it dies; whether it is a new one, and no view."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return False
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._remove, key)
        return True

    def _remove(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._marked:
            self._marked.remove(key)
            self.gradients -= size
        else:
            self.now -= size


History = list[tuple[int, int]]


@dataclass(frozen=True)
class DryRun:
    """Bytes that one process holds beside weights in an update and a merge.

    Attributes:
        activations: saved for the backward pass when the output head begins.
        passes: (everything else, gradients) at every allocation during forward and backward pass.
        step: (everything else, gradients) during clipping and the optimizer's step, new moments included.
        optimizer_state: moments and step counts.
        merge: temporaries of the costliest merge; 0 where nothing is merged.
    """

    activations: int
    passes: History
    step: History
    optimizer_state: int
    merge: int

    @property
    def step_temporaries(self) -> int:
        """Bytes that the optimizer's step takes beside gradients and its state."""
        return max(0, max(other for other, _ in self.step) - self.optimizer_state)


@contextmanager
def fake() -> Iterator[LiveBytes]:
    """Inside, new tensors have shapes and lifetimes, but neither values nor memory."""
    with FakeTensorMode(), LiveBytes() as live:
        yield live


def fake_model(stage: Stage, config: Config, hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model of a stage, as a run builds it. Call within `fake`."""
    model = empty_model(with_known_attention(config.model), hf_config, task_of(config))
    # A forecast needs no triton: its kernels allocate about what torch's products do.
    lora = config.lora.model_copy(update={"kernels": "torch"})
    make_trainable(model, stage, config.model_copy(update={"lora": lora}))
    # As the engine prepares it; where one cannot cache, `config` says so.
    restrict_layers(model, cache_span="update", can_group=True)
    return model


def with_known_attention(section: ModelSection) -> ModelSection:
    """The model with sdpa in place of a kernel that only GPUs have.

    Those save what sdpa saves for the backward pass: their inputs, the output, a number per row.
    """
    is_known = section.attn_implementation in ("eager", "sdpa")
    return section if is_known else section.model_copy(update={"attn_implementation": "sdpa"})


def example_batch(config: Config, batch_size: int) -> Batch:
    """A micro-batch of the run's form, without documents. Call outside of `fake`: its values are real."""
    task, data = task_of(config), config.data
    return task.make_batch([NO_TOKENS] * batch_size, data.sequence_length, eos_id=0, document_mask=data.document_mask)


def fake_batch(example: Batch) -> dict[str, Tensor]:
    """A micro-batch of the shapes and dtypes of `example`. Call within `fake`."""
    return {name: torch.zeros(values.shape, dtype=values.dtype) for name, values in example.items()}


def dry_run_update(
    stage: Stage, config: Config, hf_config: PretrainedConfig, *, batch_size: int, on_gpu: bool = False
) -> DryRun:
    """Run one update of one micro-batch of `batch_size` samples, and one merge, in one process without values.

    Args:
        on_gpu: as there, torch's AdamW takes all parameters at once, and W + delta is formed in one piece.

    Raises:
        UserError: the model cannot compute without values: torch knows no shapes for one of its operations.
    """
    example = example_batch(config, batch_size)
    with fake() as live, layout(GPU_LAYOUT if on_gpu else CPU_LAYOUT), _packed_rows(possible=config.data.document_mask):
        model = fake_model(stage, config, hf_config)
        optimizer = optimizer_for(model, config)
        for group in optimizer.param_groups:
            if on_gpu and not group.get("fused", True):
                group["foreach"] = True
        notes = take_notes(live, model, optimizer)
        level = live.restart()
        try:
            run_update(model, optimizer, config, fake_batch(example))
        except RuntimeError as error:
            name = type(model).__name__
            raise UserError([f"model: {name} cannot be computed without values: {first_lines(error)}"]) from None
        step, state = live.history, [s for states in optimizer.state.values() for s in states.values()]
        return DryRun(
            activations=notes.activations - level,
            passes=[(other - level, gradients) for other, gradients in notes.passes],
            step=[(other - level, gradients) for other, gradients in step],
            optimizer_state=sum(value.nbytes for value in state if isinstance(value, Tensor)),
            merge=merge_temporaries(model, live),
        )


@dataclass(frozen=True)
class OneProcess:
    """The part of `World` that an update needs, where there is one process and nothing travels."""

    num_processes: int = 1
    process_index: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over one process."""


def run_update(model: nn.Module, optimizer: Optimizer, config: Config, batch: Batch) -> None:
    """One update by the engine of a single process."""
    engine = OneProcessEngine(
        cast(World, OneProcess()),
        task_of(config),
        mixed_precision=config.training.mixed_precision,
        max_grad_norm=config.optim.max_grad_norm,
    )
    engine.update(TrainState(model, model, optimizer), [batch], seeds=[0], stop=False)


@dataclass
class Notes:
    """Bytes alive at the turns of an update; see `DryRun`, from which the level before the update is taken off."""

    activations: int = 0
    passes: History = field(default_factory=list)


def take_notes(live: LiveBytes, model: PreTrainedModel, optimizer: Optimizer) -> Notes:
    """Install hooks that fill in the notes during the next update, and mark its gradients."""
    notes = Notes()

    def at_head(*_: Any) -> None:
        notes.activations = notes.activations or live.now

    def at_gradient(parameter: Tensor) -> None:
        if parameter.grad is not None:
            live.mark_gradients([parameter.grad])

    def at_step(*_: Any) -> None:
        notes.passes = live.history
        live.restart()

    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        head.register_forward_pre_hook(at_head)
    else:  # no head that could be told from the rest: the logits count as activations
        model.register_forward_hook(at_head)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(at_gradient)
    optimizer.register_step_pre_hook(at_step)
    return notes


def merge_temporaries(model: nn.Module, live: LiveBytes) -> int:
    """Bytes that the merge of the largest layer takes for a moment; 0 where nothing is merged. Call within `fake`."""
    layers = lora_layers(model).values()
    largest = max(layers, key=lambda layer: layer.in_features * layer.out_features, default=None)
    if largest is None:
        return 0
    store = TorchStore()
    store.register([largest])
    level = live.restart()
    merge_layer(largest, store)
    return max(other for other, _ in live.history) - level


@contextmanager
def _packed_rows(*, possible: bool) -> Iterator[None]:
    """Tell transformers whether rows hold several documents, which it would read from the values of the positions.

    Without values it assumes so, and makes a mask of batch x sequence^2, of which each layer saves a copy. It has no
    argument for this that leaves the rest of its computation alone: so its function is replaced for the time being.
    """
    find_packed_rows = masking_utils.find_packed_sequence_indices
    if not possible:
        masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find_packed_rows
