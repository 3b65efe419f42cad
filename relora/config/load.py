"""Defaults <- YAML files <- `section.key=value`, checked as a whole: every problem is reported at once."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from relora.config.config_file import ConfigFile, find_config, merge, read_files
from relora.config.names import meant_by, pattern_of
from relora.config.reference import fields, rule
from relora.config.rules import broken_rules, secret_problems
from relora.config.schema import Config
from relora.config.yaml12 import format_value, parse
from relora.errors import raise_if_any


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, with what it extends below it and `section.key=value` laid over it.

    Args:
        path: a file, or the name of a shipped configuration, such as `quickstart`.

    Raises:
        UserError: one line per problem: the key, the value, the rule, and the nearest valid name.
    """
    files = read_files(find_config(path))
    mapping: dict[str, Any] = {}
    for file in reversed(files):
        mapping = merge(mapping, file.mapping)
    problems: list[str] = []
    for override in overrides:
        problems += _apply(override, mapping)
    return check(mapping, problems, files=files)


def check(mapping: dict[str, Any], problems: Sequence[str] = (), *, files: Sequence[ConfigFile] = ()) -> Config:
    """The configuration that `mapping` describes.

    Args:
        problems: found before, reported together with those of the mapping.
        files: the files that the mapping was merged from; where they are several, an unknown key names its file.

    Raises:
        UserError: one line per problem.
    """
    wrong: dict[str, str] = {}
    try:
        config = Config.model_validate(mapping)
    except ValidationError as error:
        wrong = _explain(error.errors(), mapping, files)
        config = _with_defaults(mapping, [problem["loc"] for problem in error.errors()])
    raise_if_any([*problems, *wrong.values(), *broken_rules(config, wrong_keys=wrong), *secret_problems(config)])
    return config


def _apply(override: str, mapping: dict[str, Any]) -> list[str]:
    """Set one `section.key=value` in `mapping`; returns the mistakes in its form."""
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
            return [f"{override}: {'.'.join(parents[:depth])} = {format_value(inner)} is not a section"]
        mapping = inner
    mapping[last] = value
    return []


def _explain(errors: Iterable[ErrorDetails], mapping: Mapping[str, Any], files: Sequence[ConfigFile]) -> dict[str, str]:
    """Pydantic's errors about `mapping` in the words of the reference: dotted key -> line."""
    rules = {name: rule(field) for name, field in fields()}
    lines: dict[str, str] = {}
    texts: dict[str, str] = {}  # of values: a list with many wrong entries is one value
    # Last, and so in place of other lines of their key: what only a value of the right type can get wrong.
    for error in sorted(errors, key=lambda error: error["type"] == "value_error"):
        key, value = _place(error["loc"], mapping, rules)
        if key not in texts:
            texts[key] = format_value(value)
        # An entry that a list lacks is a matter of the list's form.
        if error["type"] == "missing" and isinstance(error["loc"][-1], str):
            missing = f"{key}.{error['loc'][-1]}".lstrip(".")
            lines[missing] = f"{missing}: required"
        elif error["type"] == "extra_forbidden":
            source = next((file.path for file in files if file.has(error["loc"])), None) if len(files) > 1 else None
            where = f" in {source}" if source else ""
            lines[key] = f"{key} = {texts[key]}: unknown key{where}; {meant_by(key, rules)}"
        elif error["type"] == "value_error":
            lines[key] = f"{key} = {texts[key]}: {error['ctx']['error']}"
        else:
            allowed = rules.get(pattern_of(key), "a section (a mapping of keys)")
            hint = ", and finite" if error["type"] == "finite_number" else ""
            if isinstance(value, str) and "," in value and "list of" in allowed:
                hint = f"; a list is written [{', '.join(part.strip() for part in value.split(','))}]"
            lines[key] = f"{key} = {texts[key]}: must be {allowed}{hint}"
    # A list with wrong entries is also reported as too short; the lines of the entries say more.
    return {key: line for key, line in lines.items() if not any(other.startswith(f"{key}[") for other in lines)}


def _place(location: Sequence[int | str], mapping: Any, rules: Iterable[str]) -> tuple[str, Any]:
    """The dotted name and the value of the key that pydantic points into."""
    key, value = "", mapping
    for part in location:
        pattern = pattern_of(key)
        if pattern in rules and not any(name.startswith(f"{pattern}[]") for name in rules):
            break  # a plain value: the rest of the location is inside its type
        if isinstance(value, dict) and part in value:
            key, value = f"{key}.{part}".lstrip("."), value[part]
        elif isinstance(value, list) and isinstance(part, int):
            key, value = f"{key}[{part}]", value[part]
    return key, value


def _with_defaults(mapping: dict[str, Any], wrong: Iterable[Sequence[int | str]]) -> Config:
    """The configuration with defaults in place of the wrong keys, so that the cross-field rules can be checked."""
    right = {key: dict(value) if isinstance(value, dict) else value for key, value in mapping.items()}
    for top, *inside in wrong:
        section = right.get(str(top))
        if isinstance(section, dict) and inside:
            section.pop(inside[0], None)
        else:
            right.pop(str(top), None)
    return Config.model_validate({"output_dir": "unset"} | right)
