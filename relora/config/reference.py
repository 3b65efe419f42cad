"""What each key allows, in words: for error messages and for docs/config.md."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relora.config.schema import Config

_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", dict: "a mapping"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the tree with its dotted name; keys of list entries carry `[]`."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield prefix + name, field
        elif get_origin(field.annotation) is tuple:
            yield prefix + name, field
            yield from fields(inner, f"{prefix}{name}[].")
        else:
            yield from fields(inner, f"{prefix}{name}.")


def rule(field: FieldInfo) -> str:
    """What the key allows, e.g. `an integer >= 1, or null`."""
    return _join(_alternatives(field.annotation, field.metadata))


def _alternatives(kind: Any, metadata: list[Any]) -> list[str]:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _alternatives(args[0], inner + metadata)
    if origin in (Union, types.UnionType):
        return [words for arg in args for words in _alternatives(arg, metadata)]
    if origin is Literal:
        return [str(arg) for arg in args]
    if origin is tuple:
        least = _bounds(metadata, "min_length")
        return [f"a list of {'sources' if _section(kind) else 'texts'}{' (not empty)' if least else ''}"]
    if kind is type(None):
        return ["null"]
    bounds = [f"{sign} {limit}" for key, sign in _BOUNDS.items() for limit in _bounds(metadata, key)]
    empty = " (not empty)" if kind is str and _bounds(metadata, "min_length") else ""
    return [f"{_WORDS[origin or kind]}{empty}{' ' if bounds else ''}{' and '.join(bounds)}"]


def _bounds(metadata: list[Any], key: str) -> list[float]:
    return [limit for item in metadata if (limit := getattr(item, key, None)) is not None]


def _join(words: list[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


def _section(kind: Any) -> type[BaseModel] | None:
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if isinstance(value, tuple):
        return ", ".join(getattr(item, "path", str(item)) for item in value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def markdown() -> str:
    """The configuration reference."""
    lines = [
        "# Configuration reference",
        "",
        "Made from `relora/config/schema.py` by `python -m relora.config`. A test keeps it true.",
        "Keys marked * say how the run is computed, not what: they may change when a run is resumed.",
    ]
    section = None
    for name, field in fields():
        top = name.split(".")[0] if "." in name else "run"
        if top != section:
            section = top
            lines += ["", f"## {section}", "", "| key | rule | default | meaning |", "|---|---|---|---|"]
        how = "" if part_of_the_run(field) else " *"
        lines.append(f"| `{name}`{how} | {rule(field)} | {_default(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def part_of_the_run(field: FieldInfo) -> bool:
    """Whether another value of the key makes another run."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("part_of_the_run") is False)
