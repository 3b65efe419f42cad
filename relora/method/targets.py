"""Which layers of a model to wrap, which linear layers a rule leaves out, and why."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from relora.method.lora import LoRAConfig
from relora.method.names import tied_names
from relora.method.parameter_report import grouped
from relora.method.plain_layers import linear_layers, linear_problem

ALL_LINEAR = "all-linear"
# Parts of a transformers model that PEFT trains in full, where the model does not name its body.
_HEADS = ("classifier", "score", "qa_outputs")


@dataclass(frozen=True)
class Targets:
    """The linear layers that `target_modules` stands for.

    Attributes:
        names: of the layers to wrap, in the model's order.
        left_out: name -> reason, of layers that "all-linear" leaves out. A reason is a predicate: "is the output head".
        refused: name -> reason, of layers that were asked for by name and cannot be wrapped.
    """

    names: list[str]
    left_out: dict[str, str]
    refused: dict[str, str]


def find_targets(model: nn.Module, config: LoRAConfig, *, unfit: Mapping[str, str] | None = None) -> Targets:
    """Sort the linear layers of a plain model; those within modules_to_save are left to it.

    Args:
        unfit: name -> reason, of further layers that must not be wrapped.
    """
    saved, unfit = find_modules(model, modules_to_save(config)), unfit or {}
    heads, by_rule = _heads(model), config.target_modules == ALL_LINEAR
    tied, names, reasons = tied_names(model), list[str](), dict[str, str]()
    for name, module in linear_layers(model).items():
        if _within(name, saved) is not None or not _matches(name, config.target_modules):
            continue
        reason = unfit.get(name) or _unfitness(name, module, config, tied)
        if by_rule and (head := _within(name, heads)) is not None:
            reason = heads[head]
        if reason is None:
            names.append(name)
        else:
            reasons[name] = reason
    return Targets(names, left_out=reasons, refused={}) if by_rule else Targets(names, left_out={}, refused=reasons)


def _unfitness(name: str, module: nn.Module, config: LoRAConfig, tied: Mapping[int, list[str]]) -> str | None:
    """Why a linear layer cannot be wrapped, or None."""
    if not name:
        return "is itself the layer to wrap: nothing holds it, so nothing can replace it; put it into an nn.Sequential"
    problem = linear_problem(module)
    if problem is not None:
        return problem
    weight = cast(nn.Parameter, module.weight)
    places = tied[id(weight)]
    if len(places) > 1:
        return f"is tied ({', '.join(places)}), and wrapping it would break the tie"
    if config.r > min(weight.shape):
        return f"has a smaller side of {min(weight.shape)}, less than r = {config.r}"
    return None


def _heads(model: nn.Module) -> dict[str, str]:
    """Name -> reason for each head of a model: its output head, or else those that `task_heads` finds."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if head is None:
        return {name: f"is part of the head {name}" for name in task_heads(model)}
    return {name: "is the output head" for name, module in model.named_modules() if module is head}


def task_heads(model: nn.Module) -> list[str]:
    """Names of the parts that stand on the body of a transformers model without an output head: of a classifier.

    They are usually drawn afresh, where the body is pretrained.
    """
    prefix, get_head = getattr(model, "base_model_prefix", None), getattr(model, "get_output_embeddings", None)
    if not isinstance(prefix, str) or get_head is None or get_head() is not None:
        return []
    children = {name: child for name, child in model.named_children() if linear_layers(child)}
    body = getattr(model, prefix, None) if prefix else None
    if isinstance(body, nn.Module):
        return [name for name, child in children.items() if child is not body]
    return [name for name in children if name in _HEADS]


def modules_to_save(config: LoRAConfig) -> tuple[str, ...]:
    """The names and suffixes in modules_to_save; none for "rest", which is no list of modules."""
    saved = config.modules_to_save
    return () if saved is None or isinstance(saved, str) else tuple(saved)


def find_modules(model: nn.Module, suffixes: Iterable[str]) -> list[str]:
    """Names of all modules that end in one of `suffixes`."""
    names = [name for name, _ in model.named_modules() if name]
    return [name for suffix in suffixes for name in names if ends_in(suffix, name)]


def modules_in_full(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the modules that train in full: a fresh head that did not would stay as it was drawn."""
    if config.modules_to_save is None:
        return task_heads(model)
    return find_modules(model, modules_to_save(config))


def target_problems(config: LoRAConfig, linear: Iterable[str], targets: Targets) -> Iterator[str]:
    """Entries of target_modules that stand for no linear layer, and layers asked for that cannot be wrapped."""
    wanted, names = config.target_modules, list(linear)
    unused = [] if isinstance(wanted, str) else [one for one in wanted if not any(ends_in(one, n) for n in names)]
    # Where nothing matches, the problem is another one, below.
    if unused and (targets.names or targets.refused):  # a typing error, or an architecture that has another name
        yield f"target_modules = {unused} matches no linear layer; candidates: {', '.join(last_parts(names))}"
    yield from (f"target_modules: {line}" for line in grouped(targets.refused))
    if targets.names or targets.refused:
        return
    if targets.left_out:
        yield f"target_modules = {wanted!r} leaves no layer to wrap: {'; '.join(grouped(targets.left_out))}"
        return
    where = " outside of modules_to_save" if modules_to_save(config) else ""
    candidates = ", ".join(last_parts(names)) or "none, the model has no nn.Linear or Conv1D"
    yield f"target_modules = {wanted!r} matches no linear layer{where}; candidates: {candidates}"


def last_parts(names: Iterable[str]) -> list[str]:
    """The different last parts of `names`, sorted: `q_proj`, and `mlp.0` for an entry of a list."""
    found = {name: re.search(r"[^.]*(\.\d+)*$", name) for name in names}
    return sorted({match[0] for match in found.values() if match is not None and match[0]})


def _matches(name: str, target_modules: str | Iterable[str]) -> bool:
    """Whether `target_modules` stands for the linear layer `name`."""
    if target_modules == ALL_LINEAR:
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(ends_in(target, name) for target in target_modules)


def ends_in(suffix: str, name: str) -> bool:
    """Whether `suffix` is the last parts of `name`, or all."""
    return name == suffix or name.endswith(f".{suffix}")


def _within(name: str, modules: Iterable[str]) -> str | None:
    """The first of `modules` that is the module `name` or holds it, or None."""
    return next((module for module in modules if name == module or name.startswith(f"{module}.")), None)
