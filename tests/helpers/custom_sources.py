"""Sources of a user's own, and attempts at one, named in a configuration as `tests.helpers.custom_sources:Name`."""

from typing import Any

from datasets import Dataset

from relora.config import SourceSection
from relora.data import Source


class Countdown(Source):
    """Documents that count down, `name` of them; one of the texts is missing."""

    version = 1

    def problems(self) -> list[str]:
        return [] if self.section.name else ["name must be the number of documents"]

    def identity(self) -> dict[str, Any]:
        return {"version": self.version, "num_documents": self.section.name}

    def load(self, text_field: str, num_proc: int) -> Dataset:  # noqa: ARG002
        texts: list[str | None] = [f"{i} " * 40 + "left" for i in range(int(self.section.name or 0), 0, -1)]
        return Dataset.from_dict({"text": [*texts, None]})


def ten(section: SourceSection) -> Source:
    return Countdown(section.model_copy(update={"name": "10"}))


class Columnless(Countdown):
    def load(self, text_field: str, num_proc: int) -> Dataset:  # noqa: ARG002
        return Dataset.from_dict({"txt": ["a"]})


class Unreachable(Countdown):
    def identity(self) -> dict[str, Any]:
        raise ValueError("the server does not answer")


def broken(section: SourceSection) -> Source:
    raise KeyError(section.path)


def no_source(section: SourceSection) -> Any:
    return section.path
