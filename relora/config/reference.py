"""The rule of each key in words, for error messages and for docs/config.md."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relora.config.schema import Config

_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_INTRODUCTION = """# Configuration reference

Generated from the classes of `relora/config/schema.py` by `python -m relora.config`; a test keeps it current.

- A file may begin with `extends: other.yaml`: a path relative to the file, or the name of a shipped configuration. Its
  sections are merged key by key, lists are replaced.
- `~` and `$VARIABLES` in paths (output_dir, model.config, model.name_or_path, data.sources[].path, data.tokenizer,
  data.prepared_dir) are expanded when a file is loaded; a variable that is not set is an error.
- Where a rule ends with *module:attribute*, the import path of your own object is accepted as well.
- Keys marked * change how a run is computed, not its result: they may differ when a run is resumed.
"""


def fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the tree with its dotted name; `[]` stands for the entries of a list, as in data.sources[].path."""
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is None:
            yield prefix + name, field
        elif get_origin(field.annotation) is tuple:
            yield prefix + name, field
            yield from fields(inner, f"{prefix}{name}[].")
        else:
            yield from fields(inner, f"{prefix}{name}.")


def rule(field: FieldInfo) -> str:
    """The allowed values of a key, e.g. `an integer >= 1 or null`."""
    return _any_of(_alternatives(field.annotation, field.metadata))


def is_part_of_the_run(field: FieldInfo) -> bool:
    """Whether another value of the key makes another run."""
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("part_of_the_run") is False)


def in_identity(field: FieldInfo, value: Any) -> bool:
    """Whether this value of the key belongs to a run's identity: not what runs had that are older than the key."""
    extra = field.json_schema_extra
    had: list[Any] = []
    if isinstance(extra, dict) and "since" in extra:
        before = extra.get("as_before")  # only some of the keys have it
        had = [field.get_default(), *(before if isinstance(before, list) else [])]
    return is_part_of_the_run(field) and value not in had


def markdown() -> str:
    """The configuration reference, docs/config.md."""
    lines, section = [_INTRODUCTION.rstrip("\n")], None
    for name, field in fields():
        top = name.split(".")[0] if "." in name else "run"
        if top != section:
            section = top
            lines += ["", f"## {section}", "", "| key | rule | default | meaning |", "|---|---|---|---|"]
        mark = "" if is_part_of_the_run(field) else " *"
        lines.append(f"| `{name}`{mark} | {rule(field)} | {_default(field)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _alternatives(kind: Any, metadata: list[Any]) -> list[str]:
    """The alternatives of a type in words; `metadata` holds the bounds that apply to it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return _alternatives(args[0], inner + metadata)
    if origin in (Union, types.UnionType):
        return [words for arg in args for words in _alternatives(arg, metadata)]
    if origin is Literal:
        return [str(arg) for arg in args]
    if origin is tuple:
        return [_list(args[0], metadata)]
    return ["null"] if kind is type(None) else [_scalar(origin or kind, metadata)]


def _list(entry: Any, metadata: list[Any]) -> str:
    """A list in words: `a non-empty list of strings`; choices among names are spelled out."""
    article = "a non-empty list" if _limits(metadata, "min_length") else "a list"
    if _section_in(entry):
        return f"{article} of sources"
    if get_origin(get_args(entry)[0] if get_args(entry) else entry) is tuple:
        return f"{article} of pairs of integers >= 0"
    words = _alternatives(entry, [])
    return f"{article} of strings" if len(words) == 1 else f"{article} of names, each {_any_of(words)}"


def _scalar(kind: type, metadata: list[Any]) -> str:
    """A number or a string with its bounds in words: `a number > 0 and <= 1`, `a non-empty string`."""
    if kind is str and _limits(metadata, "pattern"):
        return "module:attribute"
    if kind is str and _limits(metadata, "min_length"):
        return "a non-empty string"
    bounds = [f"{sign} {limit}" for key, sign in _SIGNS.items() for limit in _limits(metadata, key)]
    return f"{_WORDS[kind]} {' and '.join(bounds)}".strip()


def _limits(metadata: list[Any], key: str) -> list[Any]:
    return [limit for item in metadata if (limit := getattr(item, key, None)) is not None]


def _any_of(words: list[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"


def _section_in(kind: Any) -> type[BaseModel] | None:
    """The section that a field holds, itself or in a list; None for a field with a plain value."""
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: FieldInfo) -> str:
    """The default as it would stand in a YAML file."""
    if field.is_required():
        return "required"
    value = field.get_default()
    if isinstance(value, tuple):
        return ", ".join(getattr(item, "path", str(item)) for item in value) or "[]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
