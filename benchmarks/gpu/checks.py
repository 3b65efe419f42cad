"""The tests that are marked for a GPU, as a table.

python -m benchmarks.gpu.checks [-k EXPRESSION]
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import Limit, Row, options_of, publish

ROOT = Path(__file__).parents[2]
REASON_CHARACTERS = 160


@dataclass
class Outcomes:
    """A plugin of pytest that notes how each test ended."""

    rows: list[Row] = field(default_factory=list)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
            if report.failed:
                why = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))
            test = report.nodeid.removeprefix("tests/gpu/")
            shown = " ".join(why.split())[:REASON_CHARACTERS].replace("|", "/")
            self.rows.append({"test": test, "outcome": report.outcome, "s": report.duration, "why": shown})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="only the tests that match, as pytest's")
    options, outcomes = options_of(parser), Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", options.k, str(ROOT / "tests" / "gpu")], [outcomes])
    counted = [row["outcome"] for row in outcomes.rows]
    limits = [
        Limit("tests that failed", counted.count("failed"), at_most=0),
        Limit("tests that passed", counted.count("passed"), at_least=1),
    ]
    publish({"Tests": outcomes.rows}, limits, json_path=options.json)


if __name__ == "__main__":
    main()
