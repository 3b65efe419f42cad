"""The arms: ways to train, each by name, as changes of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        settings: sections of the configuration.
        rate: the key of `optim` that holds the learning rate which is searched. What it does not train (embeddings,
            norms; under `learning_rate` that is nothing) has the rate of the file in all arms.
        has_rank: whether it has factors.
    """

    settings: Mapping[str, Mapping[str, Any]]
    rate: str
    has_rank: bool = True

    def overrides(self, *, rank: int, rate: float) -> Tree:
        """The sections that make a configuration this arm's: s = lora_alpha / r = 1 everywhere."""
        tree = {section: dict(values) for section, values in self.settings.items()}
        tree.setdefault("optim", {})[self.rate] = rate
        return tree | {"lora": {"r": rank, "lora_alpha": rank}} if self.has_rank else tree


def _low_rank(reinit: str = "kaiming", factors: str | None = None, *, method: str = "relora", **more: Any) -> Arm:
    settings = {
        "training": {"method": method},
        "relora": {"reinit": reinit, "optimizer_reset": "zero"} | more,
        "optim": {"factors": factors},
    }
    return Arm(settings, "factors_learning_rate")


ARMS: Mapping[str, Arm] = {
    "full_adamw": Arm({"training": {"method": "full"}}, "learning_rate", has_rank=False),
    "full_muon": Arm({"training": {"method": "full"}, "optim": {"name": "muon"}}, "muon_learning_rate", has_rank=False),
    "lora": _low_rank(method="lora"),
    "relora": _low_rank(),  # as published, without its warm start
    "offset": _low_rank("offset"),
    "kaiming_product": _low_rank("kaiming", "product"),  # B = 0 at every restart, where its step is B's alone
    "offset_product": _low_rank("offset", "product"),
    "offset_product_keep": _low_rank("offset", "product", optimizer_reset="keep"),
}
