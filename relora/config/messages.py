"""What is wrong with a mapping of settings, one line a key: the key, the value, the rule, the nearest valid name."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from relora.config.reference import fields, rule
from relora.config.yaml12 import inline

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
