"""W + delta of a layer, kept from one call to the next for as long as nothing in it is written."""

import weakref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora.method.kernels import Projection, no_autocast

_MARK = "written_in_place"


class MergedWeightCache:
    """One W + delta at most, dropped when an optimizer has made a step, and formed again when W, A or B was written.

    Steps are looked at beside version counters: torch's fused optimizers write without counting. A write through
    `.data` outside of a step is not seen. Where neither tells (`can_keep`), nothing may be kept.
    """

    def __init__(self) -> None:
        self._state: tuple[object, ...] | None = None
        self._merged: Tensor | None = None
        weak = weakref.ref(self)
        hook = register_optimizer_step_post_hook(lambda *_: _drop(weak))
        weakref.finalize(self, hook.remove)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return MergedWeightCache, ()  # a copy of a layer keeps nothing yet

    def is_fresh(self, parameters: tuple[Tensor, ...], dtype: torch.dtype) -> bool:
        return self._state == _state(parameters, dtype)

    def of(self, projection: Projection, dtype: torch.dtype) -> Tensor:
        parameters = (projection.weight, projection.A, projection.B)
        if self._merged is None or not self.is_fresh(parameters, dtype):
            self.drop()
            with torch.no_grad(), no_autocast(projection.weight.device.type):
                self._merged = projection.form(dtype)
            self._state = _state(parameters, dtype)
        return self._merged

    def drop(self) -> None:
        self._state = self._merged = None


def mark_written_in_place(*parameters: nn.Parameter) -> None:
    """Say of new parameters that whoever trains them writes into them, so that their version counters tell."""
    for parameter in parameters:
        setattr(parameter, _MARK, True)


def can_cache(*parameters: nn.Parameter) -> bool:
    """Whether version counters tell of every write to these factors, and there is a place for W + delta.

    Not so for the parameters that FSDP2 puts in their place (without the mark: what is written is the shard), nor
    under DeepSpeed, which writes into a flat buffer. A compiled graph has no place for it.
    """
    marked = all(hasattr(p, _MARK) and not hasattr(p, "ds_id") and not hasattr(p, "_hp_mapping") for p in parameters)
    return marked and not torch.compiler.is_compiling()


def _drop(weak: "weakref.ref[MergedWeightCache]") -> None:
    kept = weak()
    if kept is not None:
        kept.drop()


def _state(parameters: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[object, ...]:
    return (dtype, *((_storage(p), p.storage_offset(), p._version) for p in parameters))


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Told from every other one for as long as this is kept: the address alone would be used again."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
