"""Muon for hidden matrices beside AdamW for the rest: against torch's own two, apart; groups, rates, restarts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from tests.helpers.tiny import MODEL
from tests.helpers.toy import copies, factors

IDS = torch.randint(0, MODEL["vocab_size"], (4, 24), generator=torch.Generator().manual_seed(0))
NAMES = [[f"{part}_proj", "weight"] for part in (*"qkvo", "gate", "up", "down")]
LORA = LoRAConfig(r=4, target_modules=("q_proj", "down_proj"), modules_to_save=("up_proj",))


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {key: value for key, value in MODEL.items() if key != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def step(model: nn.Module, *optimizers: Optimizer, num_updates: int = 1) -> None:
    for _ in range(num_updates):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def hidden(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.split(".")[-2:] in NAMES}


def test_it_is_torchs_muon_and_adamw_side_by_side() -> None:
    model, by_hand = llama(), llama()
    settings = {"learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "weight_decay": 0.1}
    step(model, build_optimizer(model, name="muon", muon_learning_rate=0.03, **settings), num_updates=3)
    matrices, parameters = hidden(by_hand), dict(by_hand.named_parameters())
    rest = [p for name, p in parameters.items() if name not in matrices]
    decayed = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in rest]
    muon = Muon(matrices.values(), lr=0.03, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    step(by_hand, muon, AdamW(decayed, lr=3e-3, betas=(0.8, 0.9), fused=True), num_updates=3)
    assert len(matrices) == 14
    for name, values in model.named_parameters():
        assert torch.equal(values, parameters[name]), name


def test_the_rate_is_the_size_of_the_step_of_a_matrix_whatever_the_gradient() -> None:
    model = llama(intermediate_size=128)
    before = {name: p.detach().clone() for name, p in hidden(model).items()}
    step(model, build_optimizer(model, name="muon", muon_learning_rate=0.03))
    for name, values in hidden(model).items():
        d_out, d_in = values.shape
        size: Tensor = torch.linalg.matrix_norm(values - before[name], 2)
        assert 0.6 < size.item() / (0.03 * max(1, d_out / d_in) ** 0.5) < 1.3, name


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_heads_and_vectors_are_adamws(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    optimizer = build_optimizer(model, name="muon", learning_rate=1e-3)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {id(p) for p in groups["hidden"]["params"]} == {id(p) for p in hidden(model).values()}
    assert len(groups["full"]["params"]) == (1 if tied else 2)
    assert {name: (group["lr"], group["peak_lr"]) for name, group in groups.items()} == {
        "hidden": (0.02, 0.02),
        "full": (1e-3, None),
        "full_no_decay": (1e-3, None),
    }


def test_factors_have_adamw_or_an_optimizer_of_their_own_and_restart() -> None:
    for own in (None, "product"):
        model = llama()
        inject_lora(model, LORA, seed=0)
        optimizer = build_optimizer(model, name="muon", factors=own, factors_learning_rate=0.01)
        step(model, optimizer, num_updates=2)
        kept = {p: copies(optimizer.state[p]) for p in hidden(model).values() if p.requires_grad}
        assert [set(state) for state in kept.values()] == [{"momentum_buffer"}] * 2  # of the two up_proj
        restart(model, optimizer, seed=0, index=1)
        for p in factors(model).values():
            state = optimizer.state[p]
            assert state.keys() == ({"momentum_buffer"} if own else {"step", "exp_avg", "exp_avg_sq"})
            assert not any(values.any() for values in state.values())
        assert all(torch.equal(optimizer.state[p]["momentum_buffer"], kept[p]["momentum_buffer"]) for p in kept)


def test_it_is_no_optimizer_of_factors() -> None:
    with pytest.raises(ValueError, match=r"factors = muon: must be adamw, adamw_fused, adamw_8bit, product, or module"):
        build_optimizer(llama(), factors="muon")
