"""Settings for the tests of the configuration: a mapping that is right, and what is reported of a wrong one."""

import copy
from pathlib import Path
from typing import Any

from relora.config import Config, UserError, check, load_config
from relora.config.reference import fields

FIELDS = dict(fields())
SECTIONS = ("model", "data", "lora", "relora", "optim", "schedule", "training")
BASE: dict[str, Any] = {"output_dir": "runs/x", "model": {"config": "model.json"}}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict) and key in SECTIONS
        result[key] = merged(result[key], value) if nested else value
    return result


def settings(key: str, value: Any) -> dict[str, Any]:
    """A mapping that is right but for `key`, perhaps; keys of sources are set in the second of two."""
    if key.startswith("data.sources[]."):
        name = key.removeprefix("data.sources[].")
        return merged(BASE, {"data": {"sources": [{"path": "a"}, {"path": "b"} | {name: value}]}})
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return merged(BASE, value)


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.replace("[]", ".1").split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def problems_of(mapping: dict[str, Any]) -> list[str]:
    try:
        check(mapping)
    except UserError as error:
        return error.problems
    return []


def problems_of_file(path: Path, text: str, *overrides: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path, overrides)
    except UserError as error:
        return error.problems
    return []
