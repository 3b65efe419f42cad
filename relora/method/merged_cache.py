"""Per-layer cache of W + delta, invalidated when W, A or B changes."""

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from relora.method.kernels import no_autocast

if TYPE_CHECKING:
    from relora.method.lora import LoRALinear


class CacheGroup:
    """The caches of one model, emptied together after every optimizer step by one hook.

    The caches own the group, not the reverse: once the last of them is gone, so is the hook. A copy of a model has a
    group, and a hook, of its own.
    """

    def __init__(self) -> None:
        self.caches: weakref.WeakSet[MergedWeightCache] = weakref.WeakSet()
        caches = self.caches

        def drop_all(*_: object) -> None:  # refers to the set, not to the group, which would then live forever
            for cache in caches:
                cache._key = cache._merged = None

        weakref.finalize(self, register_optimizer_step_post_hook(drop_all).remove)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return CacheGroup, ()


class MergedWeightCache:
    """Holds at most one W + delta of one layer.

    It is stale once an optimizer has made a step, or W, A or B was written or replaced. Steps are watched besides
    torch's version counters because fused optimizers write without counting. Other writes that no counter sees are not
    noticed (`.data`; a checkpoint loaded into a model that fully_shard has sharded). So only an engine that makes none
    lets it outlive a pass (`LoRALinear.cache_span`).
    """

    def __init__(self, group: CacheGroup) -> None:
        self._group = group
        self._key: tuple[object, ...] | None = None
        self._merged: Tensor | None = None
        group.caches.add(self)

    def __reduce__(self) -> tuple[type, tuple[CacheGroup]]:
        return MergedWeightCache, (self._group,)  # a copy begins empty

    def get(
        self,
        parameters: Iterable[Tensor],
        dtype: torch.dtype,
        form: Callable[[torch.dtype], Tensor] | None = None,
        *,
        keep: bool = True,
    ) -> Tensor | None:
        """Return the cached W + delta if it is fresh, else cache and return `form(dtype)`, or None without `form`.

        Args:
            parameters: W as it is stored, A and B.
            dtype: of the W + delta that is wanted.
            keep: False for a new one that nothing but its caller holds.
        """
        tensors, key = list(parameters), None
        if keep:
            # A weak reference to a storage never equals that of a later one; its address might.
            storages = [StorageWeakRef(p.untyped_storage()) for p in tensors]  # type: ignore[no-untyped-call]
            key = dtype, *((at, p.storage_offset(), p._version) for at, p in zip(storages, tensors, strict=True))
            if self._key == key:
                return self._merged
            if form is None:
                return None
        assert form is not None
        self._key = self._merged = None  # before forming, so that only one is in memory
        # In an evaluation under inference_mode it would be a tensor that no later backward pass may save.
        with torch.inference_mode(mode=False), torch.no_grad(), no_autocast(tensors[0].device.type):
            merged = form(dtype)
        if keep:
            self._key, self._merged = key, merged
        return merged

    def drop(self) -> None:
        """Free W + delta; the next `get` that is to form it does so."""
        self._key = self._merged = None


def attach_caches(layers: Iterable["LoRALinear"]) -> None:
    """Give each layer of a model a cache; all share one optimizer hook, removed when no layer holds its cache."""
    group = CacheGroup()
    for layer in layers:
        layer.cache = MergedWeightCache(group)
