"""A handful of the moments of `python -m benchmarks.chaos`; hundreds of them, on two processes too, are run by hand."""

import random
from pathlib import Path

import pytest

from benchmarks.chaos import ALONE, Storm, rage

NUM_KILLS, NUM_UPDATES, SEED = 3, 6, 1


def test_a_run_that_is_killed_ends_as_if_nobody_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    storm = rage(Storm(ALONE, tmp_path, random.Random(SEED), updates=NUM_UPDATES), NUM_KILLS)
    assert storm.differing == []
    assert (storm.kills, storm.orphans) == (NUM_KILLS, 0)
    assert storm.in_saves > 0, "the moments that matter most were missed"
