"""Defaults <- YAML <- `section.key=value`, checked as a whole: every problem is told at once."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from relora.config.messages import shown, told
from relora.config.problems import UserError, raise_if_any
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
