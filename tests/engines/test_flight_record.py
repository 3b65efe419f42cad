"""torch's flight recorder, with gloo in the place of NCCL."""

import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]

from relora.engines.flight_record import write_flight_record


def collective() -> None:
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    distributed.all_reduce(torch.ones(2))
    write_flight_record()


def test_the_last_collectives_are_in_a_file_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", f"{tmp_path}/new/flight_record_")
    monkeypatch.setenv("RANK", "3")
    process = multiprocessing.get_context("fork").Process(target=collective)  # the group ends with it
    process.start()
    process.join(60)
    record = pickle.loads((tmp_path / "new/flight_record_3").read_bytes())
    # Before it perhaps those of other tests, which this process was forked with.
    assert record["entries"][-1]["profiling_name"] == "gloo:all_reduce"


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    write_flight_record()
    assert list(tmp_path.iterdir()) == []
