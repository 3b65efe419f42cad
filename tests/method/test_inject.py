"""What keeps a model from being wrapped is said all at once, and the model stays as it was."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from relora import LoRAConfig, inject_lora
from relora.method.inject import problems
from relora.method.lora import lora_layers
from relora.method.targets import find_modules, find_targets
from tests.helpers.toy import CONFIG, toy


class Tied(nn.Module):
    """Two layers that share their weight, a narrow one, and one of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.two_bytes = nn.Linear(6, 6).bfloat16()
        self.two.weight = self.one.weight


def refused(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The problems of a model, after a check that inject_lora raises them and changes nothing."""
    found = problems(model, config)
    before = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"\w") as error:
        inject_lora(model, config)
    assert str(error.value).splitlines() == found
    for (name, requires_grad, values), (now, p) in zip(before, model.named_parameters(), strict=True):
        assert (name, requires_grad) == (now, p.requires_grad)
        assert torch.equal(values, p)
    return found


def test_a_model_that_fits_has_no_problems() -> None:
    model = toy()
    assert problems(model, CONFIG) == []
    assert find_targets(model, CONFIG).names == ["inner", "conv", "outer"]
    assert find_targets(model, LoRAConfig(r=3, modules_to_save=["conv"])).names == ["inner", "outer"]
    assert find_modules(model, ["norm", "conv", "nothing"]) == ["norm", "conv"]


def test_all_problems_are_said_at_once() -> None:
    config = LoRAConfig(
        r=4,
        target_modules=("one", "free", "two_bytes", "fre"),
        modules_to_save=("head",),
        forward="merged",
        base_dtype=None,
    )
    assert [problem.split(";")[0] for problem in refused(Tied(), config)] == [
        "modules_to_save = ['head'] matches no module",
        "target_modules = ['fre'] matches no linear layer",
        "target_modules: one is tied (one.weight, two.weight), and wrapping it would break the tie",
        "target_modules: free has a smaller side of 2, less than r = 4",
        "forward = merged: two_bytes: " + problems_of_bf16(),
    ]


def problems_of_bf16() -> str:
    model = nn.Sequential(nn.Linear(6, 6).bfloat16())
    [problem] = refused(model, LoRAConfig(r=1, forward="merged"))
    return problem.removeprefix("forward = merged: 0: ").split(";")[0]


@pytest.mark.parametrize(
    ("targets", "saved", "message"),
    [
        (["attn"], None, "target_modules = ['attn'] matches no linear layer; candidates: conv, inner, outer"),
        ("inn", None, "target_modules = 'inn' matches no linear layer; candidates: conv, inner, outer"),
        (
            ["inner"],
            ["inner"],
            "target_modules = ['inner'] matches no linear layer outside of modules_to_save; "
            "candidates: conv, inner, outer",
        ),
    ],
)
def test_targets_that_match_nothing_come_with_candidates(
    targets: str | list[str], saved: Sequence[str] | None, message: str
) -> None:
    config = LoRAConfig(r=3, target_modules=targets, modules_to_save=None if saved is None else list(saved))
    assert refused(toy(), config) == [message]


def test_a_wrapped_model_has_one_problem() -> None:
    model = toy()
    inject_lora(model, CONFIG)
    assert problems(model, replace(CONFIG, r=100)) == [
        "the model has LoRA layers already; merge_lora(model) takes them out"
    ]
    assert len(lora_layers(model)) == 3
