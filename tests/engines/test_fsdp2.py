"""FSDP2 with the options of its launcher that the launch file leaves as they are, in one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from relora.engines.fsdp2 import FSDP2Engine, FSDPOptions
from relora.engines.world import World
from relora.method.names import named_parameters
from relora.model.tasks import CausalLM
from tests.helpers.tiny import MODEL

IDS = (torch.arange(16) * 3 + 40 * torch.arange(2)[:, None]) % MODEL["vocab_size"]
BATCH = {"input_ids": IDS, "labels": IDS}


def tiny(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {key: value for key, value in MODEL.items() if key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**shape | {"tie_word_embeddings": tied}))
    inject_lora(model, LoRAConfig(r=4, lora_alpha=8, modules_to_save="rest"), seed=0)
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, learning_rate=1e-2)


@pytest.fixture
def world() -> Iterator[World]:
    found = World(wanted=None, group_of_one=True)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        (FSDPOptions(reshard_after_forward=False), False),
        (FSDPOptions(min_num_params=4000), True),
        (FSDPOptions(min_num_params=4000, reshard_after_forward=False), False),
        (FSDPOptions(one_unit=True), True),
    ],
    ids=["not resharded", "tied, by size", "by size, not resharded", "tied, one unit"],
)
def test_evaluations_updates_and_restarts_are_those_of_plain_torch(
    world: World, options: FSDPOptions, tied: bool
) -> None:
    plain, model = tiny(tied=tied), tiny(tied=tied)
    names = [*named_parameters(plain)]
    engine = FSDP2Engine(world, CausalLM(), options, mixed_precision="no", max_grad_norm=None, sync_each_batch=True)
    state, optimizer = engine.prepare(model, optimizer_of), optimizer_of(plain)
    num_labels = CausalLM().num_labels(BATCH)
    for index in (1, 2):
        for _ in range(2):
            engine.update(state, [BATCH], seeds=[0], stop=False)
            optimizer.zero_grad()
            torch.autograd.backward(CausalLM().loss(plain, BATCH) / num_labels)
            optimizer.step()
        with engine.inference(state):
            loss = engine.loss(state, BATCH)
        torch.testing.assert_close(loss, CausalLM().loss(plain, BATCH).detach(), atol=1e-3, rtol=0)
        engine.restart(state, seed=0, index=index)
        restart(plain, optimizer, seed=0, index=index)
    assert [*named_parameters(state.model)] == names
    for name, parameter in named_parameters(state.model).items():
        ours, theirs = engine.store.read(parameter), named_parameters(plain)[name]
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-4, rtol=0)
