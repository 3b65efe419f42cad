"""What the launcher's environment asks of FSDP2 and DeepSpeed, as accelerate understands it."""

from dataclasses import dataclass
from typing import Any

from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy


@dataclass(frozen=True)
class FSDPOptions:
    """Options of `fully_shard`.

    Attributes:
        reshard_after_forward: free a gathered block after its forward pass, and gather it again for the backward.
        cpu_offload: parameters, gradients and moments rest in host memory.
        activation_checkpointing: recompute the activations of each block in the backward pass.
        block_names: classes of the modules that become units; empty: those that the model names itself.
        min_num_params: instead of classes, modules of at least so many parameters.
        one_unit: the whole model is one unit.
    """

    reshard_after_forward: bool
    cpu_offload: bool
    activation_checkpointing: bool
    block_names: tuple[str, ...]
    min_num_params: int | None
    one_unit: bool

    def units(self, model: nn.Module) -> list[nn.Module]:
        """The modules of `model` that are gathered one at a time, without units within them, the innermost first.

        Raises:
            ValueError: there are none.
        """
        if self.one_unit:
            return []
        if self.min_num_params is not None:
            return _of_size(model, self.min_num_params)
        names = self.block_names or tuple(getattr(model, "_no_split_modules", None) or ())
        units = [module for module in model.modules() if type(module).__name__ in names]
        if not units:
            raise ValueError(
                f"FSDP: {type(model).__name__} has no module of class {', '.join(names) or '(it names none)'}; "
                "set fsdp_transformer_layer_cls_to_wrap in the accelerate config"
            )
        return units


def fsdp_options() -> FSDPOptions:
    """The options of accelerate's FSDP plugin, as the launcher's environment sets them."""
    plugin: Any = FullyShardedDataParallelPlugin()
    policy = getattr(plugin.auto_wrap_policy, "__name__", None)
    return FSDPOptions(
        reshard_after_forward=plugin.reshard_after_forward,
        cpu_offload=isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        activation_checkpointing=plugin.activation_checkpointing,
        block_names=tuple(plugin.transformer_cls_names_to_wrap or ()),
        min_num_params=plugin.min_num_params if policy == "size_based_auto_wrap_policy" else None,
        one_unit=policy is None,
    )


def _of_size(model: nn.Module, min_num_params: int) -> list[nn.Module]:
    """From the innermost outwards: modules that hold enough parameters not yet in a unit."""
    units, taken = [], set[int]()
    for module in reversed([*model.modules()][1:]):
        mine = {id(p): p.numel() for p in module.parameters() if id(p) not in taken}
        if sum(mine.values()) >= min_num_params and not isinstance(module, nn.ModuleList):
            units.append(module)
            taken |= mine.keys()
    return units
