"""Which code uses the weight of another module, found in the source.

`F.linear(x, self.out_proj.weight)` bypasses `out_proj`: factors in its place would never be used. To ask for the dtype
or the shape of a weight changes nothing as long as it is stored as it is.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType

from torch import nn

# Attributes that tell nothing about the values of a weight.
_FORM = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "is_meta", "requires_grad"}
_TESTS = {"isinstance", "hasattr", "getattr", "id", "type"}


@dataclass(frozen=True)
class WeightUse:
    """A place in the code of a class that uses the weight of another module.

    Attributes:
        path: attribute names from `root` to the module: `self.attn.out_proj.weight` has (attn, out_proj).
        root: the variable: self, or another one.
        uses_values: whether the values are used, and not the dtype, device or shape alone.
        is_certain: whether training or evaluation gets there: the code is in no branch, or the branch asks for
            `training`, or it is torch's own. A branch that asks for a setting may never be taken.
        by_torch: whether the code is torch's own.
    """

    path: tuple[str, ...]
    root: str
    uses_values: bool
    is_certain: bool
    by_torch: bool


def weight_uses(model: nn.Module) -> Iterator[tuple[str, str, WeightUse]]:
    """(name of a module, class whose code uses its weight, the use), for all modules of `model`."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        for use in _uses_of_class(type(module)):  # type: ignore[arg-type]
            end = ".".join(use.path)
            if use.root == "self":
                children = [prefix + end] if prefix + end in modules else []
            else:
                children = [other for other in modules if other.startswith(prefix) and other.endswith(f".{end}")]
            yield from ((child, type(module).__name__, use) for child in children)


@lru_cache(maxsize=4096)
def asks_for_form(code: CodeType, line: int) -> bool:
    """Whether all that line `line` of a function wants of a weight is its dtype, device, shape or type."""
    tree = _tree(code)
    parents, offset = _parents(tree), line - code.co_firstlineno + 1
    here = [node for node in ast.walk(tree) if _is_weight(node) and getattr(node, "end_lineno", 0) == offset]
    return bool(here) and all(_is_about_form(parents[node]) for node in here)


@lru_cache(maxsize=4096)
def _uses_of_class(cls: type[nn.Module]) -> tuple[WeightUse, ...]:
    """The weights of other modules that `forward`, and the methods that it reaches, use."""
    reached, waiting, uses = set[str](), ["forward"], list[WeightUse]()
    while waiting:
        name = waiting.pop()
        owner = next((owner for owner in cls.__mro__ if name in vars(owner)), object)
        method = inspect.unwrap(vars(owner)[name]) if owner not in (object, nn.Module) else None
        if name in reached or not isinstance(method, FunctionType):
            continue
        reached.add(name)
        names = _names(method.__code__)
        waiting += names
        if "weight" in names:
            uses += _uses_in(_tree(method.__code__), by_torch=owner.__module__.startswith("torch.nn."))
    return tuple(uses)


def _names(code: CodeType) -> set[str]:
    """All attributes and globals that the code of a function names, those of its inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _tree(code: CodeType) -> ast.AST:
    """The syntax tree of a function; an empty one if it has no source: typed at a prompt."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _uses_in(method: ast.AST, *, by_torch: bool) -> Iterator[WeightUse]:
    """Each `self.a.b.weight` and `block.a.b.weight` of a method."""
    parents = _parents(method)
    for node in filter(_is_weight, ast.walk(method)):
        path, root, around = list[str](), getattr(node, "value", None), node
        while isinstance(root, ast.Attribute):
            path.insert(0, root.attr)
            root = root.value
        tests = list[str]()
        while around in parents:
            around = parents[around]
            if isinstance(around, ast.If | ast.IfExp):
                tests.append(ast.unparse(around.test))
        is_certain = by_torch or not tests or any("self.training" in test for test in tests)
        if path and isinstance(root, ast.Name):
            yield WeightUse(tuple(path), root.id, not _is_about_form(parents[node]), is_certain, by_torch)


def _is_weight(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _is_about_form(parent: ast.AST) -> bool:
    """Whether the expression around a weight asks for its dtype, its shape or its type."""
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in _TESTS
    return isinstance(parent, ast.Attribute) and parent.attr in _FORM
