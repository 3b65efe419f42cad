"""Values that each key allows and refuses, derived from its type a second time, value by value."""

import math
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tests.config.tree import FIELDS

OF_ANY_KIND = [
    *("", "nonsense", "5", "true", 5, -3, 0, 2.5, -0.5, True, False, None, math.nan, math.inf, -math.inf),
    *([], ["a"], [""], [5], {}, {"a": 1}, [[3, 5]], [[3, -5]], [[3]], [[0, 1, 2]], [3, 5]),
    *(
        "a:b",
        "package.module:Name",
        "package.module:",
        ":Name",
        "a.b",
        "a:b:c",
        "a:b\n",
        ["tensorboard", "a:b"],
        ["a:"],
    ),
]


def allows(kind: Any, metadata: list[Any], value: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return allows(args[0], [*metadata, *inner], value)
    if origin in (Union, types.UnionType):
        return any(allows(arg, metadata, value) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple and args[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(args) and all(map(allows, args, [[]] * len(args), value))
    if origin is tuple:
        right = isinstance(value, list) and len(value) >= limit(metadata, "min_length", 0)
        return right and all(allows(args[0], [], item) for item in value)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return False  # no candidate here is a source
    types_allowed = {float: (int, float), types.NoneType: (types.NoneType,)}.get(kind, (origin or kind,))
    return type(value) in types_allowed and in_bounds(metadata, value)


def in_bounds(metadata: list[Any], value: Any) -> bool:
    if isinstance(value, str):
        patterns = [item.pattern for item in metadata if getattr(item, "pattern", None)]
        return len(value) >= limit(metadata, "min_length", 0) and all(re.fullmatch(p, value) for p in patterns)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        math.isfinite(value)
        and limit(metadata, "ge", -math.inf) <= value <= limit(metadata, "le", math.inf)
        and limit(metadata, "gt", -math.inf) < value < limit(metadata, "lt", math.inf)
    )


def limit(metadata: list[Any], name: str, default: float) -> float:
    found = [value for item in metadata if (value := getattr(item, name, None)) is not None]
    return found[-1] if found else default


def parts(kind: Any, metadata: list[Any]) -> list[tuple[Any, list[Any]]]:
    """The alternatives of a type without their annotations, each with its bounds."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return parts(args[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return [part for arg in args for part in parts(arg, metadata)]
    return [(kind, metadata)]


def around_the_bounds(kind: Any, metadata: list[Any]) -> list[Any]:
    """Each bound, and its nearest neighbours on both sides; near misses of names."""
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return [*names, *(f"{name}s" for name in names), *(name.upper() for name in names), *(n[:-1] for n in names)]
    bounds = [value for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)
              for value in [getattr(item, name)]]  # fmt: skip
    if kind is int:
        return [bound + step for bound in bounds for step in (-1, 0, 1)]
    return [v for bound in bounds for v in (math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf))]


def candidates(field: FieldInfo) -> list[Any]:
    near = [value for part in parts(field.annotation, field.metadata) for value in around_the_bounds(*part)]
    return [*OF_ANY_KIND, *near]


def wrong_values(key: str) -> list[Any]:
    field = FIELDS[key]
    wrong = [value for value in candidates(field) if not allows(field.annotation, field.metadata, value)]
    # What is wrong with an entry is told of the entry: test_entries_of_sources.
    return [v for v in wrong if not (key == "data.sources" and isinstance(v, list) and v)]


def right_values(key: str) -> list[Any]:
    field = FIELDS[key]
    if key == "data.sources":
        return [[{"path": "python-stdlib"}], [{"path": "x", "weight": 2.0}]]
    return [value for value in candidates(field) if allows(field.annotation, field.metadata, value)]
