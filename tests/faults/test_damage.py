"""A sample of `python -m benchmarks.reliability`: files of a run damaged one at a time. All of it is run by hand."""

from pathlib import Path

import pytest

from benchmarks.reliability import OTHER, RECOVERED, REFUSED, TRACEBACK, outcomes

NUM_CASES, SEED = 10, 0


def test_damage_is_recovered_from_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELORA_CACHE", "of the test")  # the script sets its own, which ends with the test
    found = outcomes(tmp_path, sample=NUM_CASES, seed=SEED)
    bad = [(each.case.file, each.case.damage, each.said) for each in found if each.kind in (TRACEBACK, OTHER)]
    assert bad == []
    assert {RECOVERED, REFUSED} == {each.kind for each in found}, "a sample that shows one answer only shows little"
    assert len({(each.case.target, each.case.file) for each in found}) == NUM_CASES
