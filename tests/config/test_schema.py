"""Every key of the configuration, broken in every way that its rule allows."""

import math
from pathlib import Path
from typing import Any

import pytest

from relora.config import Config, check
from relora.config.load import format_value
from relora.config.reference import rule
from relora.config.yaml12 import dump
from tests.config.tree import BASE, FIELDS, SECTIONS, merged, problems_of, problems_of_file, settings, value_of
from tests.config.values import parts, right_values, wrong_values


def test_the_walk_reaches_every_key_and_every_kind_of_rule() -> None:
    assert len(FIELDS) > 50
    assert sum(len(wrong_values(key)) for key in FIELDS) > 800
    assert all(wrong_values(key) and right_values(key) for key in FIELDS)
    for key, field in FIELDS.items():
        for kind, metadata in parts(field.annotation, field.metadata):
            if kind in (int, float) and key != "data.sources[].weight":
                assert any(hasattr(m, name) for m in metadata for name in ("ge", "gt")), f"{key} has no lower bound"


@pytest.mark.parametrize("key", FIELDS)
def test_each_wrong_value_gives_one_line_with_key_value_and_rule(key: str) -> None:
    for value in wrong_values(key):
        not_finite = isinstance(value, float) and not math.isfinite(value)
        numeric = any(kind is float for kind, _ in parts(FIELDS[key].annotation, FIELDS[key].metadata))
        finite = ", and finite" if not_finite and numeric else ""
        line = f"{key.replace('[]', '[1]')} = {format_value(value)}: must be {rule(FIELDS[key])}{finite}"
        assert problems_of(settings(key, value)) == [line]


@pytest.mark.parametrize("key", FIELDS)
def test_each_right_value_is_taken_as_it_is(key: str) -> None:
    for value in right_values(key):
        config = Config.model_validate(settings(key, value))  # without the rules that join keys
        if key == "data.sources":
            assert [source.path for source in config.data.sources] == [source["path"] for source in value]
        else:
            found = value_of(config, key)
            assert ([list(pair) for pair in found] if key == "data.skip" else found) == value
            assert isinstance(value_of(config, key), bool) == isinstance(value, bool)


@pytest.mark.parametrize("key", FIELDS)
def test_a_wrong_value_from_a_file_and_from_an_override_is_told_alike(key: str, tmp_path: Path) -> None:
    path, value = tmp_path / "c.yaml", wrong_values(key)[-1]
    expected = problems_of(settings(key, value))
    assert problems_of_file(path, dump(settings(key, value))) == expected
    if "[]" not in key:
        assert problems_of_file(path, dump(BASE), f"{key}={format_value(value)}") == expected


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [None, 5, "text", True, [], ["a"]], ids=str)
def test_a_section_must_be_a_mapping(section: str, value: Any) -> None:
    problems = problems_of(BASE | {section: value})
    assert problems[0] == f"{section} = {format_value(value)}: must be a section (a mapping of keys)"
    assert len(problems) == 1 or section == "model"  # without it no model is given


def test_entries_of_sources() -> None:
    found = problems_of(
        merged(BASE, {"data": {"sources": [{"path": "a", "weight": 0}, {}, 5, {"path": "b", "wieght": 1}]}})
    )
    assert found == [
        "data.sources[0].weight = 0: must be a number > 0",
        "data.sources[1].path: required",
        "data.sources[2] = 5: must be a section (a mapping of keys)",
        "data.sources[3].wieght = 1: unknown key; the nearest is data.sources[].weight",
    ]


def test_output_dir_is_the_only_key_without_a_default() -> None:
    assert problems_of({"model": {"config": "m"}}) == ["output_dir: required"]
    assert check(BASE).training.max_steps == 20000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("true", "'true'"),
        (5, "5"),
        ("5", "'5'"),
        ("", "''"),
        ("no", "'no'"),
        ("a b", "a b"),
        ("a\nb", '"a\\nb"'),
        (math.nan, ".nan"),
        (math.inf, ".inf"),
        ([1, "x"], "[1, x]"),
        ({"a": None}, "{a: null}"),
        ("x" * 1000, "x" * 200 + "..."),
    ],
)
def test_values_are_shown_as_they_stand_in_a_file(value: Any, text: str) -> None:
    assert format_value(value) == text
