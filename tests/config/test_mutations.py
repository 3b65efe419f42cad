"""Mutated inputs are used, or refused in a line: some of those that `python -m benchmarks.mutations` makes."""

import os
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.mutations import furnish, mutations

NUMBER = 300


def test_a_mutated_input_is_used_or_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RELORA_CACHE", str(tmp_path / "cache"))
    furnish()
    found = list(mutations(0, NUMBER))
    assert [(index, case, failure) for index, case, failure, _ in found if failure is not None] == []
    kinds = Counter(case.kind for _, case, _, _ in found)
    assert len(kinds) == 6
    assert min(kinds.values()) >= NUMBER / 30
    assert Path.cwd() == tmp_path
    assert os.environ["HF_HUB_OFFLINE"] == "1"
