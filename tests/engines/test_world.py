"""The time limit of collectives: the watchdog of a run, which says more, comes first."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import relora.engines.registry
from relora.config import check
from relora.engines import connect
from relora.engines.world import LONGEST, TIMEOUT, collective_timeout
from tests.helpers.tiny import settings


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [(1, TIMEOUT), (60, TIMEOUT), (90, timedelta(hours=2.5)), (None, LONGEST), (1e30, LONGEST)],
)
def test_the_time_limit_of_collectives_is_beyond_that_of_the_watchdog(
    minutes: float | None, expected: timedelta
) -> None:
    assert collective_timeout(minutes) == expected


def test_gloo_can_count_the_longest_time_limit() -> None:
    assert LONGEST / timedelta(milliseconds=1) < 2**31


def test_the_processes_join_with_the_time_limit_of_the_configuration(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Joined(Exception):  # noqa: N818
        pass

    def world(**options: Any) -> None:
        raise Joined(options["timeout"])

    monkeypatch.setattr(relora.engines.registry, "World", world)
    with pytest.raises(Joined) as joined:
        connect(check(settings(corpus, tmp_path, training__timeout_minutes=300)))
    assert joined.value.args == (timedelta(hours=6),)
