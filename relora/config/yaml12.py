"""YAML 1.2: 1e-3 is a number, `no` is a string, a key appears once.

PyYAML follows YAML 1.1, where 1e-3 is a string, `no` is false, 010 is eight and 2024-01-01 is a date; YAML 1.2 corrects
all of these. The keys of mappings are strings, as in JSON.
"""

import re
from collections import Counter
from typing import Any

import yaml

from relora.files import MAX_VALUES, plain_problem

_MAX_CHARACTERS = 100_000  # about a second of reading
_MAX_SHOWN = 200
_TAG = "tag:yaml.org,2002:"
_REPLACED = {f"{_TAG}{kind}" for kind in ("bool", "float", "int", "timestamp", "value")}
_BASES = {"0o": 8, "0x": 16}
_SCALARS = [  # YAML 1.2, section 10.3.2: tag, pattern, possible first characters
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"(?:[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$",
        "-+.0123456789",
    ),
]


class Loader(yaml.SafeLoader):
    """SafeLoader with the numbers and booleans of YAML 1.2; keys are strings, and duplicates are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping with string keys. Raises ConstructorError for keys that appear twice."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted(word for word, times in Counter(key.value for key in keys).items() if times > 1)
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"these keys appear more than once: {', '.join(twice)}", node.start_mark
            )
        for key in keys:
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys of `<<` into the mapping. Raises ConstructorError where merges of merges grow without end."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"<< merges more than {MAX_VALUES:,} keys", node.start_mark
            )

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """10, 1_000, 010 (ten), 0o17, 0x1F."""
        word = self.construct_scalar(node)
        return int(word, _BASES.get(word[:2], 10))


class Dumper(yaml.SafeDumper):
    """SafeDumper whose unquoted strings `Loader` reads back as strings; a string stays on one line."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A string, in quotes where a reader of YAML 1.1 would take it for something else, such as `no`."""
        tag: str = _READER_1_1.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        plain = None if tag == f"{_TAG}str" else "'"
        # YAML has five line breaks, and folds them outside of double quotes.
        has_breaks = any(sign in text for sign in "\n\r\x85\u2028\u2029")
        return self.represent_scalar(f"{_TAG}str", text, style='"' if has_breaks else plain)


_READER_1_1 = yaml.SafeLoader("")


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """First character -> (tag, pattern) of the plain scalars: YAML 1.1's null and merge, 1.2's numbers and booleans."""
    resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern, firsts in _SCALARS:
        for first in firsts:
            resolvers.setdefault(first, []).append((f"{_TAG}{kind}", re.compile(pattern)))
    return resolvers


Loader.yaml_implicit_resolvers = Dumper.yaml_implicit_resolvers = _resolvers()
Loader.add_constructor(f"{_TAG}int", Loader.construct_int)
Dumper.add_representer(str, Dumper.represent_text)


def parse(text: str) -> Any:
    """The value of a YAML document: plain data (`relora.files.plain_problem`). Raises `yaml.YAMLError`."""
    if len(text) > _MAX_CHARACTERS:
        raise yaml.YAMLError(f"has {len(text):,} characters, more than {_MAX_CHARACTERS:,}")
    try:
        value = yaml.load(text, Loader=Loader)  # nosec B506  # a subclass of yaml.SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML's constructors of tags such as !!bool expect text that fits.
        raise yaml.YAMLError(f"a value does not fit its tag ({type(error).__name__}: {error})") from None
    problem = plain_problem(value)
    if problem is not None:
        raise yaml.YAMLError(problem)
    return value


def dump(value: Any) -> str:
    """`value` as a YAML document that `parse` reads back."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def inline(value: Any) -> str:
    """`value` on one line, as in a YAML file."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def format_value(value: Any) -> str:
    """`value` as in a YAML file, on one line of bounded length, for messages."""
    text = inline(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
