"""Any tree that is right is the same after it was written to a file and read again."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from relora.config import Config, UserError, check
from relora.config.derived import identity
from relora.config.yaml12 import dump, parse
from tests.config.tree import BASE, FIELDS, merged
from tests.config.tree import settings as settings_of
from tests.config.values import right_values

SINGLE = sorted(key for key in FIELDS if "[]" not in key)
# Words that YAML of any version could take for something else.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20
) | st.sampled_from(["no", "1e3", "0x1f", "12:30", "~", "#x", "- a", "a: b", "\u2028"])


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """A mapping in which several keys have values that each of them allows."""
    tree = dict(BASE)
    for key in draw(st.lists(st.sampled_from(SINGLE), max_size=8, unique=True)):
        candidates = right_values(key)
        if candidates:
            tree = merged(tree, settings_of(key, draw(st.sampled_from(candidates))))
    return tree


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(trees())
def test_a_config_survives_its_file(tree: dict[str, Any]) -> None:
    try:
        config = check(tree)
    except UserError as error:  # values that are right by themselves may not fit together
        assert error.problems
        return
    read = check(parse(dump(config.model_dump(mode="json"))))
    assert read == config
    assert identity(read, {}) == identity(config, {})


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXT,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_value_survives_yaml(value: Any) -> None:
    read = parse(dump({"value": value}))["value"]
    assert read == value
    assert repr(read) == repr(value), "and its types do"


def test_the_trees_are_no_small_part_of_all() -> None:
    assert len(SINGLE) > 50
    assert sum(len(right_values(key)) > 1 for key in SINGLE) > 0.8 * len(SINGLE)
    assert Config.model_validate(BASE).output_dir == BASE["output_dir"]
