"""Access to parameters and their optimizer state under ZeRO.

A value that a restart writes is held in two places: the parameter that the model computes with, and an fp32 master in
the flat partition of some process, which overwrites the first at the next step. Frozen weights have no such master.
Adam's step count is one number for each flat partition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora.engines.sharded_store import DistributedStore
from relora.method.optimizer_state import Slot, fresh_state
from relora.method.store import Shard, Stepped


@dataclass(frozen=True)
class Fragment:
    """The place of a process's shard of a trained parameter: flat[offset : offset + length], entries from `start` on.

    Attributes:
        flat: the flat fp32 partition, which is the key of its state in the inner optimizer.
        group: number of the partition.
        members: the parameters that have entries in it, on this process or others.
    """

    flat: Tensor
    group: int
    members: Sequence[nn.Parameter]
    offset: int
    length: int
    start: int

    def shard_of(self, flat: Tensor) -> Shard:
        return Shard(flat.detach()[self.offset : self.offset + self.length], self.start, is_partial=True)


class ZeroStore(DistributedStore):
    """Parameters under ZeRO, with masters and moments in its flat partitions.

    Attributes:
        zero: ZeRO's optimizer of the stage in training, by which a trained parameter's master is found.
    """

    zero: Any = None

    def check(self, parameter: nn.Parameter) -> None:
        if not (_is_partitioned(parameter) or not parameter.requires_grad or hasattr(parameter, "_hp_mapping")):
            raise ValueError(f"a trained parameter of shape {tuple(parameter.shape)} is not managed by DeepSpeed")

    def raw_shape(self, parameter: nn.Parameter) -> torch.Size:
        shape: torch.Size = parameter.ds_shape if _is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]
        return shape

    def local(self, parameter: nn.Parameter) -> Shard:
        return _model_shard(parameter)  # also after the end of a stage, when the masters are gone

    def local_copies(self, parameter: nn.Parameter) -> Mapping[str, Shard]:
        copies = {"parameter": _model_shard(parameter)}
        if parameter.requires_grad:
            fragment = _fragment(self.zero, parameter)
            copies["fp32 master"] = fragment.shard_of(fragment.flat)
        return copies

    def make_state(
        self, optimizer: Optimizer, parameter: nn.Parameter, slots: Mapping[str, Slot], *, step: float | None
    ) -> None:
        zero: Any = optimizer  # it steps an inner optimizer, over flat partitions
        inner, flat = zero.optimizer, _fragment(zero, parameter).flat
        if not inner.state.get(flat):  # several parameters share it
            inner.state[flat] = fresh_state(inner, flat, slots, shape=self.shape(parameter), step=step)

    def stepped(self, optimizer: Optimizer, parameter: nn.Parameter) -> Stepped:
        zero: Any = optimizer
        fragment = _fragment(zero, parameter)
        # ZeRO-3 splits a parameter group into several flat partitions, ZeRO-1 and 2 have one a group.
        group = zero.sub_group_to_group_id[fragment.group] if _is_partitioned(parameter) else fragment.group
        return Stepped(zero.optimizer, zero.optimizer.param_groups[group], fragment.flat, fragment.members)

    def state(self, optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
        zero: Any = optimizer
        state: dict[str, Any] = zero.optimizer.state.get(_fragment(zero, parameter).flat, {})
        return state

    def _shard(self, optimizer: Optimizer, parameter: nn.Parameter, values: Tensor) -> tuple[torch.Size, Shard]:
        fragment = _fragment(optimizer, parameter)
        if values.shape == fragment.flat.shape:
            return self.shape(parameter), fragment.shard_of(values)
        return values.shape, Shard(values, 0)


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether this is a ZeRO-3 parameter."""
    return hasattr(parameter, "ds_id")


def _model_shard(parameter: Any) -> Shard:
    """The values that the model computes with: the whole tensor under ZeRO-1 and 2, a shard under ZeRO-3."""
    if not _is_partitioned(parameter):
        return Shard(parameter.detach(), 0)
    if parameter.ds_status.name == "AVAILABLE":
        # Small parameters stay gathered between updates; the gathered copy would hide a write to the partition.
        parameter.partition()
    partition = parameter.ds_tensor.detach()
    index = torch.distributed.get_rank(parameter.ds_process_group)
    start = min(partition.numel() * index, parameter.ds_numel)
    return Shard(partition[: parameter.ds_numel - start], start, is_partial=True)


def _fragment(zero: Any, parameter: Any) -> Fragment:
    """The place of this process's shard of the master in `zero`; of length 0 where it has none."""
    if _is_partitioned(parameter):
        shard = _model_shard(parameter)
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        return Fragment(flat, group, zero.fp16_groups[group], offset, shard.values.numel(), shard.start)
    group = next(i for i, members in enumerate(zero.bit16_groups) if any(p is parameter for p in members))
    flat, mapping, members = (
        zero.single_partition_of_fp32_groups[group],
        parameter._hp_mapping,
        zero.bit16_groups[group],
    )
    if mapping is None:
        return Fragment(flat, group, members, 0, 0, 0)
    master_range, model_range = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(flat, group, members, master_range.start, master_range.numel, model_range.start)
