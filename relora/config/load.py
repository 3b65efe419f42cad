"""Defaults <- YAML <- `section.key=value`, checked as a whole: every problem is told at once."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from relora.config.problems import UserError, raise_if_any
from relora.config.reference import fields, rule
from relora.config.rules import broken_rules
from relora.config.tree import Config
from relora.config.yaml12 import parse


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with `section.key=value` laid over it.

    Raises:
        UserError: one line a problem: the key, the value, the rule, and the nearest valid name.
    """
    mapping, problems = _read(Path(path)), []
    for override in overrides:
        problems += _lay_over(mapping, override)
    return check(mapping, problems)


def check(mapping: dict[str, Any], problems: Sequence[str] = ()) -> Config:
    """The configuration that `mapping` describes; UserError with `problems` and all that is wrong with it."""
    wrong: dict[str, str] = {}
    try:
        config = Config.model_validate(mapping)
    except ValidationError as error:
        wrong = _told(error)
        config = _with_defaults(mapping, wrong)
    raise_if_any([*problems, *wrong.values(), *broken_rules(config, wrong_keys=wrong)])
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        mapping = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError([f"{path}: there is no such configuration file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError([f"{path}: cannot be read ({error})"]) from None
    except yaml.YAMLError as error:
        raise UserError([f"{path}: not valid YAML ({' '.join(str(error).split())})"]) from None
    if not isinstance(mapping, dict):
        raise UserError([f"{path}: must be a mapping of sections, not {type(mapping).__name__}"])
    # A run's own config.yaml can be trained again: what was derived is derived anew.
    mapping.pop("derived", None)
    return mapping


def _lay_over(mapping: dict[str, Any], override: str) -> list[str]:
    """Set one `section.key=value` in `mapping`; returns what is wrong with its form."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override}: an override is written section.key=value"]
    try:
        value = parse(text)
    except yaml.YAMLError:
        return [f"{override}: the value is not valid YAML"]
    *parents, last = key.split(".")
    for parent in parents:
        inner = mapping.setdefault(parent, {})
        if not isinstance(inner, dict):
            return [f"{override}: {parent} is not a section"]
        mapping = inner
    mapping[last] = value
    return []


def _told(error: ValidationError) -> dict[str, str]:
    """The problems pydantic found, one line a key, in our words."""
    rules = {name: rule(field) for name, field in fields()}
    told: dict[str, str] = {}
    for problem in error.errors():
        key = _key(problem["loc"])
        if problem["type"] == "extra_forbidden":
            told[key] = f"{key} = {problem['input']}: unknown key{_nearest(key, rules)}"
        elif problem["type"] == "missing":
            told[key] = f"{key}: required"
        else:
            allowed = rules.get(_pattern(key), "a section (a mapping of keys)")
            found = "null" if problem["input"] is None else problem["input"]
            told[key] = f"{key} = {found}: must be {allowed}"
    # A list is also reported as too short for its wrong entries; the entries say it better.
    return {key: line for key, line in told.items() if not any(other.startswith(f"{key}[") for other in told)}


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted name of the key: pydantic's location without the tags of union members."""
    section: type[BaseModel] | None = Config
    parts: list[str] = []
    for part in location:
        if isinstance(part, int):
            if section is None:
                break
            parts[-1] += f"[{part}]"
            continue
        if section is None:
            break
        parts.append(part)
        section = _inner(section, part)
    return ".".join(parts)


def _inner(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = section.model_fields.get(name)
    names = [known for known, _ in fields(section)]
    inside = field is not None and any(known.startswith((f"{name}.", f"{name}[].")) for known in names)
    if field is None or not inside:
        return None
    default = field.get_default()
    return type(default[0] if isinstance(default, tuple) else default)


def _pattern(key: str) -> str:
    """`data.sources[3].path` -> `data.sources[].path`."""
    return "".join(c for c in key if not c.isdigit()) if "[" in key else key


def _nearest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    hits = difflib.get_close_matches(_pattern(key), names, n=1, cutoff=0.5)
    if not hits:
        last = {name.rsplit(".", 1)[-1]: name for name in names}
        close = difflib.get_close_matches(key.rsplit(".", 1)[-1], last, n=1)
        hits = [last[name] for name in close]
    return f"; the nearest is {hits[0]}" if hits else ""


def _with_defaults(mapping: dict[str, Any], wrong: Iterable[str]) -> Config:
    """The configuration with the defaults in place of the wrong keys, so that the other rules can be checked."""
    right = {key: dict(value) if isinstance(value, dict) else value for key, value in mapping.items()}
    for key in wrong:
        top, _, rest = key.partition(".")
        first = rest.split(".")[0].split("[")[0]
        if isinstance(right.get(top), dict) and first:
            right[top].pop(first, None)
        else:
            right.pop(top, None)
    return Config.model_validate({"output_dir": "unset"} | right)
