"""The layers that can be wrapped: nn.Linear and transformers' Conv1D, where they are that and nothing more."""

from torch import nn

# Attributes that every module has and that hold its tensors and children: those of a wrapped layer are its own.
_CONTENTS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
# Hooks, and `training`. The dicts of hooks are shared, so that a handle taken before or after wrapping still works.
_SHARED = vars(nn.Module()).keys() - _CONTENTS
# What a subclass may define and still be a linear layer to those who call it.
_HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters"}


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2), whose weight is (d_in, d_out). Known by name, not imported."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All nn.Linear, subclasses among them, and Conv1D of a model, by name: those that can be wrapped, and others."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether this computes x W^T + bias and nothing else, so that LoRALinear can stand in its place."""
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and linear_problem(module) is None


def linear_problem(module: nn.Module) -> str | None:
    """Why LoRALinear cannot stand in the place of this nn.Linear or Conv1D, or None.

    Wrapped, it would compute something else (a router, a quantized layer, a parametrization), or lose what it has.
    """
    held = vars(module)
    if "forward" in held:
        return "has a forward of its own, set on this instance"
    parameters = held["_parameters"]
    if not isinstance(parameters.get("weight"), nn.Parameter) or "bias" not in parameters:
        return "has a weight or a bias that is computed at each use"
    more = sorted({*parameters, *held["_buffers"], *held["_modules"]} - {"weight", "bias"})
    if more:
        return f"holds more than a weight and a bias ({', '.join(more)})"
    if held["_load_state_dict_pre_hooks"]:
        return "has a hook on loading its state, which is bound to this very module"
    methods = _own_methods(type(module))
    return f"is a {type(module).__name__}, with methods of its own ({', '.join(methods)})" if methods else None


def _own_methods(kind: type[nn.Module]) -> list[str]:
    """Methods and properties by which a subclass of nn.Linear differs from it."""
    if (kind.__module__, kind.__name__) in {
        ("transformers.pytorch_utils", "Conv1D"),
        ("transformers.models.falcon.modeling_falcon", "FalconLinear"),  # its forward computes the same product
    }:
        return []
    classes = kind.__mro__[: kind.__mro__.index(nn.Linear)]
    defined = {name: value for one in classes for name, value in vars(one).items()}
    return sorted(
        name
        for name, value in defined.items()
        if name not in _HARMLESS and (callable(value) or isinstance(value, property | staticmethod | classmethod))
    )


def share_attributes(plain: nn.Module, layer: nn.Module) -> None:
    """Give `layer` the hooks, the mode and whatever else was set on `plain` and `layer` has not itself."""
    for name, value in vars(plain).items():
        if name in _SHARED or not hasattr(layer, name):
            vars(layer)[name] = value
    layer.train(plain.training)


def return_attributes(layer: nn.Module, plain: nn.Module, *, own: frozenset[str]) -> None:
    """Give `plain` what `share_attributes` took, as it is now, and what was set on `layer` since.

    Args:
        own: attributes that belong to `layer` alone.
    """
    kept = {name: value for name, value in vars(layer).items() if name in _SHARED or name not in own}
    for name in vars(plain).keys() - kept.keys() - own - _CONTENTS:
        del vars(plain)[name]
    vars(plain).update(kept)
