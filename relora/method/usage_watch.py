"""Run a plain model and note which layers are called, and which other code reads or writes their weights."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relora.method.names import named_parameters
from relora.method.weight_readers import asks_for_form

Pass = Callable[[nn.Module], Tensor]
# Training may drop a layer at random, seldom all layers of a kind, and hardly ever twice.
NUM_TRAINING_PASSES = 2


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, while it is active, how operators and Python code use the parameters of a model.

    A weight is recognized by its storage, which its views share. No hooks: torch's fast paths are not taken where there
    are any.

    Attributes:
        phase: training or evaluation.
        called: the layers that have run.
        running: the layers that run now, the innermost last.
        read: layer -> the code that uses the values of its weight outside of its own forward pass.
        examined: layer -> the code that asks for the dtype or the shape of its weight.
        written: canonical name of a parameter that an operator writes -> the first phase in which it did.
        with_gradient: canonical names of the parameters that have got a gradient.
        originals: the parameters that an operator writes, with their values before.
    """

    # Otherwise torch imports its compiler, for seconds, to keep it away from the method below.
    _should_skip_dynamo = classmethod(lambda _: False)

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "training"
        self.names = {_storage(parameter): name for name, parameter in named_parameters(model).items()}
        self.parameters = {_storage(parameter): parameter for parameter in model.parameters()}
        self.layer_of = {_storage(cast(Tensor, layer.weight)): name for name, layer in layers.items()}
        self.originals: dict[int, tuple[Tensor, Tensor]] = {}
        self.running: list[str] = []
        self.called: set[str] = set()
        self.read: dict[str, str] = {}
        self.examined: dict[str, str] = {}
        self.written: dict[str, str] = {}
        self.with_gradient: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note the parameters among the arguments of one operator, and run it."""
        kwargs, schema = kwargs or {}, func._schema
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns)
        for place, argument in enumerate(() if is_view else schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self.note(_storage(tensor), is_write=is_write)
        return func(*args, **kwargs)

    def note(self, storage: int, *, is_write: bool) -> None:
        """An operator is about to read or write a tensor of this storage."""
        parameter, layer = self.parameters.get(storage), self.layer_of.get(storage)
        if is_write and parameter is not None:
            if storage not in self.originals:
                self.originals[storage] = parameter, parameter.detach().clone()
            self.written.setdefault(self.names[storage], self.phase)
        if layer is not None and layer not in self.running:
            self.read.setdefault(layer, "other code")

    def note_access(self, layer: str, caller: FrameType) -> None:
        """Python code outside of the layer has fetched its weight."""
        if layer in self.running:
            return
        owner = caller.f_locals.get("self")
        reader = caller.f_code.co_name if owner is None else type(owner).__name__
        seen = self.examined if asks_for_form(caller.f_code, caller.f_lineno) else self.read
        seen.setdefault(layer, reader)


def watch_passes(model: nn.Module, layers: Mapping[str, nn.Module], loss: Pass, generate: Pass | None) -> Watch:
    """Forward and backward in training mode, then forward in evaluation mode without gradients.

    Args:
        layers: the linear layers to watch, by name.
        loss: computes the scalar whose gradients are of interest.
        generate: a further pass in evaluation mode.
    """
    watch = Watch(model, layers)
    with ExitStack() as stack:
        stack.enter_context(_kept_as_it_was(model, watch))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            stack.callback(setattr, layer, "__class__", type(layer))
            layer.__class__ = _watched(type(layer), watch, name)
        for name, parameter in named_parameters(model).items():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
                hook = partial(_take_gradient, watch.with_gradient, name)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
        model.train()
        for _ in range(NUM_TRAINING_PASSES):
            with torch.enable_grad(), watch:
                value = loss(model)
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
        watch.phase = "evaluation"
        model.eval()
        with torch.no_grad(), watch:
            for run in (loss, *([generate] if generate is not None else [])):
                run(model)
    return watch


def _take_gradient(reached: set[str], name: str, parameter: Tensor) -> None:
    """Note that a parameter has got a gradient, and free it: the gradients of a whole model are never in memory."""
    reached.add(name)
    parameter.grad = None


def _watched(cls: type[nn.Module], watch: Watch, name: str) -> type[nn.Module]:
    """A subclass of `cls` that tells `watch` when it runs, and when other code fetches its weight."""

    def run(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watch.called.add(name)
        watch.running.append(name)
        try:
            return inner(*args, **kwargs)
        finally:
            watch.running.pop()

    class Watched(cls):  # type: ignore[valid-type, misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return run(super().__call__, *args, **kwargs)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return run(super().forward, *args, **kwargs)

        @property
        def weight(self) -> Any:
            watch.note_access(name, sys._getframe(1))
            return self._parameters["weight"]

    Watched.__name__ = cls.__name__
    return Watched


@contextmanager
def _kept_as_it_was(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Give the model back its values, attributes and gradients at the end, and the CPU its random numbers."""
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]  # batch norm writes them unannounced
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    states = random.getstate(), numpy_random.get_state() if numpy_random is not None else None
    for parameter, *_ in parameters:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        if numpy_random is not None:
            numpy_random.set_state(states[1])
        with torch.no_grad():
            for tensor, values in (*watch.originals.values(), *buffers):
                tensor.copy_(values)
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, attributes, held in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(held)


def _storage(tensor: Tensor) -> int:
    """An identity that all views of a tensor share."""
    return int(tensor.untyped_storage()._cdata)
