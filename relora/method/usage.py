"""How a model uses its linear layers and parameters: which layers LoRA layers can replace, and what is ever trained.

A LoRA layer can stand in the place of a linear layer that is called, and whose weight no other code reads or writes.
Elsewhere its factors would be bypassed, or its frozen weight would change between restarts. `usage_in_source` knows
what the source of the model's classes tells, `watch_usage` what one forward and backward pass shows.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from relora.method.names import canonical, named_parameters, tied_names
from relora.method.plain_layers import is_linear
from relora.method.usage_watch import Pass, Watch, watch_passes
from relora.method.weight_readers import weight_uses


@dataclass(frozen=True)
class ModelUsage:
    """How a model uses its linear layers and parameters.

    Attributes:
        unfit: name of a linear layer that no LoRA layer can replace -> why, a predicate.
        examined: name of a linear layer -> the code that asks for the dtype or the shape of its weight, which must
            therefore be stored as it is.
        idle: canonical names of the parameters that the loss does not depend on.
        frozen: canonical names of the parameters that the architecture itself freezes.
        written: canonical name of a parameter that a forward pass in evaluation mode writes.
        routed: whether some parameters get a gradient from some batches only: experts, layers that are dropped.
        not_run: why the model could not be run, so that only its source was looked at; else None.
    """

    unfit: Mapping[str, str] = field(default_factory=dict)
    examined: Mapping[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    written: tuple[str, ...] = ()
    routed: bool = False
    not_run: str | None = None

    def problems(self) -> list[str]:
        """Why a model with this usage cannot be trained at all, a line each."""
        if not self.written:
            return []
        return [
            f"the model writes {len(self.written)} of its own parameters when it is evaluated, such as "
            f"{self.written[0]}: what is trained, evaluated and saved would differ; a setting of the model may switch "
            "this off (rescale_every = 0 of RWKV)"
        ]

    def lines(self) -> list[str]:
        """What a user should know before the run: parameters that do not train, and whether this is all known."""
        lines = []
        if self.idle:
            names = sorted(self.idle)
            listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            lines.append(f"{len(names)} parameters get no gradient from the loss and do not train: {listed}")
        if self.not_run is not None:
            lines.append(
                f"the model could not be tried before the run ({self.not_run}): which layers can be wrapped is known "
                "from its source alone"
            )
        return lines


def usage_in_source(model: nn.Module) -> ModelUsage:
    """What the code of the model's classes tells, without running it."""
    layers, unfit, examined = _layers(model), dict[str, str](), dict[str, str]()
    for name, reader, use in weight_uses(model):
        if name not in layers:
            continue
        if not use.uses_values:
            examined.setdefault(name, reader)
        elif use.is_certain:
            unfit.setdefault(name, _read_by(reader))
    return ModelUsage(unfit=unfit, examined=examined)


def watch_usage(model: nn.Module, loss: Pass, *, generate: Pass | None = None, is_fresh: bool = False) -> ModelUsage:
    """Run `model`, which is not wrapped yet, forward and backward, and forward again in evaluation mode.

    Its parameters, buffers, attributes and gradients are afterwards what they were, and so are the states of the random
    number generators on the CPU.

    Args:
        loss: computes a scalar from the model, on a batch of its own.
        generate: runs a forward pass as generation does.
        is_fresh: the model is as its class has made it, so that parameters that are frozen are meant to be.
    """
    names, source = named_parameters(model), usage_in_source(model)
    frozen = frozenset(name for name, parameter in names.items() if is_fresh and not parameter.requires_grad)
    watch = watch_passes(model, _layers(model), loss, generate)
    floating = {name for name, parameter in names.items() if parameter.is_floating_point()}
    routed = _routed(floating - watch.with_gradient, watch.with_gradient)
    idle = frozenset(floating - watch.with_gradient - routed)
    return ModelUsage(
        unfit=_unfit(model, watch, idle, frozen),
        examined={**source.examined, **watch.examined},
        idle=idle,
        frozen=frozen,
        written=tuple(name for name, phase in watch.written.items() if phase == "evaluation"),
        routed=bool(routed),
    )


def usage_of_wrapped(model: nn.Module, wrapped: Iterable[str]) -> dict[str, str]:
    """The layers that are unfit where a checkpoint says which ones are wrapped: all linear layers but `wrapped`.

    Args:
        wrapped: canonical names.
    """
    known, layers = set(wrapped), _layers(model)
    return {name: "was not wrapped when the run began" for name in layers if canonical(name) not in known}


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def _unfit(model: nn.Module, watch: Watch, idle: Iterable[str], frozen: Iterable[str]) -> dict[str, str]:
    """The linear layers that no LoRA layer can replace, and why."""
    unfit, tied, layers = dict[str, str](), tied_names(model), _layers(model)
    # Its fast paths depend on the batch and on the device.
    by_torch = {name: reader for name, reader, use in weight_uses(model) if use.by_torch and use.uses_values}
    for name, layer in layers.items():
        weight, reader = f"{canonical(name)}.weight", watch.read.get(name) or by_torch.get(name)
        if len(tied[id(layer.weight)]) > 1:
            continue  # the uses of the other name would be taken for its own
        if weight in watch.written:
            unfit[name] = f"has a weight that the model itself writes in {watch.written[weight]}"
        elif reader is not None:
            unfit[name] = _read_by(reader)
        elif weight in idle:
            unfit[name] = "gets no gradient: " + (
                "the loss does not depend on it" if name in watch.called else "nothing calls it"
            )
        elif weight in frozen:
            unfit[name] = "is frozen by the model itself"
    return unfit


def _read_by(reader: str) -> str:
    return f"is bypassed: {reader} computes with its weight and does not call it"


def _routed(missing: Iterable[str], reached: Iterable[str]) -> set[str]:
    """The names in `missing` that belong to an entry of a list of which others were reached: experts.

    `layers.0.experts.3.w1` is one if nothing of `layers.0.experts.3` was reached, and `layers.0.experts.1.w1` was.
    """

    def entries(name: str) -> Iterator[tuple[str, tuple[str, str]]]:
        parts = name.split(".")
        for place in (place for place, part in enumerate(parts) if part.isdigit()):
            yield ".".join(parts[: place + 1]), (".".join(parts[:place]), ".".join(parts[place + 1 :]))

    found = [entry for name in reached for entry in entries(name)]
    reached_entries, reached_kinds = {entry for entry, _ in found}, {kind for _, kind in found}
    return {
        name
        for name in missing
        if any(entry not in reached_entries and kind in reached_kinds for entry, kind in entries(name))
    }
