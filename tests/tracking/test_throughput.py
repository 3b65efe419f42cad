"""What an update's FLOPs are taken to be, against torch's own count, and the peak that they are held against."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from relora import LoRAConfig, inject_lora
from relora.config import check
from relora.tracking.throughput import PEAKS, flops_per_token, peak_flops
from relora.train.train import train
from tests.helpers.tiny import MODEL, all_metrics

ROWS, LENGTH, R = 3, 16, 4
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def llama(**changes: Any) -> LlamaForCausalLM:
    shape = {key: value for key, value in MODEL.items() if key != "model_type"}
    # torch counts the products of the eager attention, not those within its kernel for CPUs.
    return LlamaForCausalLM(LlamaConfig(**shape | {"attn_implementation": "eager"} | changes))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 8}], ids=str)
def test_full_rank_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = llama(**changes)
    ids = torch.randint(300, (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert flops_per_token(model, sequence_length=LENGTH) * ROWS * LENGTH == counter.get_total_flops()


def test_a_frozen_weight_takes_four_and_its_factors_six() -> None:
    model = llama()
    full = flops_per_token(model, sequence_length=LENGTH)
    report = inject_lora(model, LoRAConfig(r=R, modules_to_save="rest"))
    assert report
    shapes = 2 * [(32, 32)] * 4 + 2 * [(32, 48)] * 3
    expected = full - sum(2 * d * e for d, e in shapes) + sum(6 * R * (d + e) for d, e in shapes)
    assert flops_per_token(model, sequence_length=LENGTH) == expected


def test_of_experts_those_count_that_a_token_goes_to() -> None:
    def flops(experts_per_token: int) -> float:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = MixtralConfig(
            vocab_size=300, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=experts_per_token, **shape
        )
        with torch.device("meta"):
            return flops_per_token(MixtralForCausalLM(config), sequence_length=LENGTH)

    assert flops(2) - flops(1) == pytest.approx(2 * 6 * 3 * 32 * 48)


def test_the_peak_is_the_stated_one_or_that_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(CPU, mixed_precision="no", stated_tflops=None) is None
    assert peak_flops(CPU, mixed_precision="no", stated_tflops=0.5) == 5e11
    for name, peak in PEAKS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(GPU, mixed_precision="bf16", stated_tflops=None) == 1e12 * peak.bf16
        assert peak_flops(GPU, mixed_precision="no", stated_tflops=None) == 1e12 * peak.fp32
        assert peak_flops(GPU, mixed_precision="no", stated_tflops=3) == 3e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    assert peak_flops(GPU, mixed_precision="bf16", stated_tflops=None) is None


def test_metrics_hold_a_run_against_its_peak(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run(relora={"restart_every": None}, training__max_steps=3, training__peak_tflops=0.01)
    train(check(tree))
    model = llama()
    inject_lora(model, LoRAConfig(r=4, modules_to_save="rest"))
    flops = flops_per_token(model, sequence_length=32)
    updates = [line for line in all_metrics(tree["output_dir"]) if "loss" in line]
    assert len(updates) == 3
    for line in updates:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e10)
