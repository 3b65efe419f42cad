"""A manifest that is changed in any place is noticed; one that is not is read back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from relora.checkpoint.format import MANIFEST, sealed
from relora.checkpoint.load import read_manifest
from relora.config import UserError

PROPERTY = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAME = st.text("abcw.", min_size=1, max_size=8)
VALUE = st.none() | st.booleans() | st.integers(-5, 50) | st.floats() | st.text(max_size=8) | st.lists(NAME, max_size=2)


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    """The content of a manifest of a few parameters, all of which are trained, some with moments."""
    names = draw(st.lists(NAME, min_size=1, max_size=4, unique=True))
    moved = draw(st.lists(st.sampled_from(names), unique=True))
    facts = {"bytes": draw(st.integers(0, 2**50)), "sha256": "0" * 64}
    files = {"trained-00001.safetensors": facts | {"group": "trained"}}
    tensors = dict.fromkeys(names, "trained-00001.safetensors")
    if moved:
        files["moments-00001.safetensors"] = facts | {"group": "moments"}
        tensors |= {f"{name}:exp_avg": "moments-00001.safetensors" for name in moved}
    step = draw(st.integers(1, 10**9))
    content = {"format": 3, "step": step, "skipped": draw(st.integers(0, step)), "cycle": draw(st.integers(0, 99_999))}
    told = sorted(draw(st.sets(st.integers(1, step), max_size=3)))
    content |= {"spikes": draw(st.integers(0, 9)), "losses": [[at, draw(st.floats(-9, 9))] for at in told]}
    left_out = {"first": 8, "end": 16, "step": step, "loss": 9.0, "limit": 4.5, "checkpoint": step - 1}
    content |= {"left_out": draw(st.sampled_from([[], [left_out]]))}
    content |= {
        "stage": draw(st.sampled_from(["full_rank", "low_rank"])),
        "num_states": 1,
        "evaluated": draw(st.booleans()),
    }
    content |= {"steps": {name: float(draw(st.integers(0, 10**6))) for name in moved}, "metrics": None}
    return content | {"fingerprint": draw(st.text(max_size=16)), "data": "", "files": files, "tensors": tensors}


def places(value: Any) -> list[tuple[Any, ...]]:
    """The paths of all entries, of mappings within mappings too."""
    if not isinstance(value, dict):
        return [()]
    return [(), *((key, *rest) for key, inner in value.items() for rest in places(inner))]


@given(manifests())
@PROPERTY
def test_a_manifest_is_read_back(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(sealed(content)))
    assert read_manifest(tmp_path).model_dump(mode="json") == sealed(content)


@given(manifests(), st.data())
@PROPERTY
def test_any_change_of_a_manifest_is_noticed(tmp_path: Path, content: dict[str, Any], data: st.DataObject) -> None:
    written = sealed(content)
    *path, last = data.draw(st.sampled_from(places(written)[1:]))
    changed = copy.deepcopy(written)
    inner = changed
    for key in path:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = data.draw(VALUE)
    assume(json.dumps(changed) != json.dumps(written))
    (tmp_path / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path)
    assert len(error.value.problems) == 1
