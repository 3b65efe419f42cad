"""Tiny runs of one process do what they did when golden.json was recorded; `golden --check` makes those of two, too."""

from pathlib import Path

import pytest
import torch

from tests.end_to_end import golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.workplace(tmp_path_factory.mktemp("golden"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the numbers are those of a CPU")
@pytest.mark.parametrize("name", golden.ALONE)
def test_numbers_are_those_recorded(name: str, folder: Path) -> None:
    try:
        golden.check(name, folder)
    except golden.ChangedError as complaint:
        pytest.fail(str(complaint), pytrace=False)


def test_every_run_is_recorded() -> None:
    assert golden.read().keys() == {golden.RUNS[name].recorded_as or name for name in golden.RUNS}
