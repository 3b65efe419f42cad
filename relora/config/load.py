"""Defaults <- YAML <- `section.key=value`, checked as a whole: every problem is told at once."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from relora.config.reference import fields, rule
from relora.config.rules import broken_rules
from relora.config.schema import Config
from relora.config.yaml12 import inline, parse
from relora.errors import UserError, raise_if_any

_MOST_CHARACTERS = 200


def told(errors: Iterable[ErrorDetails], mapping: Mapping[str, Any]) -> dict[str, str]:
    """Pydantic's errors about `mapping`, by dotted key, in our words."""
    rules = {name: rule(field) for name, field in fields()}
    lines: dict[str, str] = {}
    for error in errors:
        key, value = _place(error["loc"], mapping, rules)
        if error["type"] == "missing":
            lines[f"{key}.{error['loc'][-1]}".lstrip(".")] = f"{key}.{error['loc'][-1]}: required".lstrip(".")
        elif error["type"] == "extra_forbidden":
            lines[key] = f"{key} = {shown(value)}: unknown key; {_nearest(key, rules)}"
        else:
            allowed = rules.get(_pattern(key), "a section (a mapping of keys)")
            finite = ", and finite" if error["type"] == "finite_number" else ""
            lines[key] = f"{key} = {shown(value)}: must be {allowed}{finite}"
    # A list is also reported as too short for its wrong entries; the entries say it better.
    return {key: line for key, line in lines.items() if not any(other.startswith(f"{key}[") for other in lines)}


def shown(value: Any) -> str:
    """`value` as in a YAML file, in one line of bounded length."""
    text = inline(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def _place(location: Sequence[int | str], mapping: Any, rules: Iterable[str]) -> tuple[str, Any]:
    """The dotted name of the key that pydantic points into, and its value."""
    key, value = "", mapping
    for part in location:
        if _is_leaf(_pattern(key), rules):
            break
        if isinstance(value, dict) and part in value:
            key, value = f"{key}.{part}".lstrip("."), value[part]
        elif isinstance(value, list) and isinstance(part, int):
            key, value = f"{key}[{part}]", value[part]
    return key, value


def _is_leaf(key: str, rules: Iterable[str]) -> bool:
    return key in rules and not any(name.startswith(f"{key}[]") for name in rules)


def _pattern(key: str) -> str:
    """`data.sources[3].path` -> `data.sources[].path`."""
    return re.sub(r"\[\d+\]", "[]", key)


def _nearest(key: str, rules: Iterable[str]) -> str:
    """A hint: a key of this very name elsewhere, or the most similar name of the section, or of all."""
    section, _, name = _pattern(key).rpartition(".")
    known = [*dict.fromkeys(rule.split(".")[0] for rule in rules), *rules]
    last = {other.rpartition(".")[2]: other for other in reversed(known)}
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == section}
    long = {other: full for other, full in last.items() if len(other) > 2 and full in rules}  # all is similar to `r`
    here = beside if section else {}
    for names, least in ((last, 1.0), (beside, 0.6), (long, 0.6), (here, 0.2)):
        hits = difflib.get_close_matches(name, names, n=1, cutoff=least)
        if hits:
            return f"the nearest is {names[hits[0]]}"
    return f"known here are {', '.join(beside)}"


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
        wrong = told(error.errors(), mapping)
        config = _with_defaults(mapping, [problem["loc"] for problem in error.errors()])
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
        raise UserError([f"{path}: must be a mapping of sections, not {shown(mapping)}"])
    # A run's own config.yaml can be trained again: what was derived is derived anew.
    mapping.pop("derived", None)
    return mapping


def _lay_over(mapping: dict[str, Any], override: str) -> list[str]:
    """Set one `section.key=value` in `mapping`; returns what is wrong with its form."""
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all([*parents, last]):
        return [f"{override}: an override is written section.key=value"]
    try:
        value = parse(text)
    except yaml.YAMLError:
        return [f"{override}: the value is not valid YAML"]
    for depth, parent in enumerate(parents, 1):
        inner = mapping.setdefault(parent, {})
        if not isinstance(inner, dict):
            return [f"{override}: {'.'.join(parents[:depth])} = {shown(inner)} is not a section"]
        mapping = inner
    mapping[last] = value
    return []


def _with_defaults(mapping: dict[str, Any], wrong: Iterable[Sequence[int | str]]) -> Config:
    """The configuration with the defaults in place of the wrong keys, so that the other rules can be checked."""
    right = {key: dict(value) if isinstance(value, dict) else value for key, value in mapping.items()}
    for top, *inside in wrong:
        section = right.get(str(top))
        if isinstance(section, dict) and inside:
            section.pop(inside[0], None)
        else:
            right.pop(str(top), None)
    return Config.model_validate({"output_dir": "unset"} | right)
