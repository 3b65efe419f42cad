"""YAML as people expect it: 1e-3 is a number, `no` is a word, a key stands once.

PyYAML follows YAML 1.1, where 1e-3 is a string and `no` is false; YAML 1.2 mended both.
"""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans; duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"these keys stand more than once: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _rules() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    replaced = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
    kept = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in replaced]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    own = [
        ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("tag:yaml.org,2002:int", r"[-+]?[0-9]+(?:_[0-9]+)*$", "-+0123456789"),
        (
            "tag:yaml.org,2002:float",
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$",
            "-+.0123456789",
        ),
    ]
    for tag, pattern, firsts in own:
        for first in firsts:
            kept.setdefault(first, []).append((tag, re.compile(pattern)))
    return kept


Loader.yaml_implicit_resolvers = _rules()


def parse(text: str) -> Any:
    """The value of a YAML text. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=Loader)
