"""YAML 1.2 is read, and what is written is read back."""

import math
from typing import Any

import pytest
import yaml

from relora.config.yaml12 import dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("010", 10),
        ("09", 9),
        ("-7", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b1", "0b1"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("'5'", "5"),
        ("{0: a, true: b}", {"0": "a", "true": "b"}),
    ],
)
def test_yaml_is_read_by_version_1_2(text: str, value: Any) -> None:
    read = parse(text)
    assert (read, type(read)) == (value, type(value))


def test_infinity_and_nan_are_numbers() -> None:
    assert parse("-.inf") == -math.inf
    assert math.isnan(parse(".nan"))


def test_merge_keys_still_work() -> None:
    assert parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {a: 1, a: 2}", "1: a\n'1': b", "- {x: 1, x: 1}"])
def test_a_key_stands_once(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="appear more than once"):
        parse(text)


WORDS_OF_NUMBERS = ("1e3", "12e4567", "010", "0o7", "5", "1:30", "2024-01-01")
WORDS_OF_YAML = ("no", "yes", "null", "true", "", "~", "a: b", "#", "two\nlines")


@pytest.mark.parametrize("word", [*WORDS_OF_NUMBERS, *WORDS_OF_YAML])
def test_what_is_written_is_read_back(word: str) -> None:
    value = {"a": word, "b": [word, 1e-8, 10**20, None, False], word: 1}
    assert parse(dump(value)) == value
