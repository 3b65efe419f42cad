"""What a model does with its layers decides which of them are wrapped, how they are stored, and what trains."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from relora.method.inject import problems
from relora.method.lora import lora_layers
from relora.method.usage import ModelUsage, usage_in_source, watch_usage
from tests.helpers.architectures import VOCAB, batch, build, without_gradient

CONFIG = LoRAConfig(r=2, lora_alpha=3.7, modules_to_save="rest")
WIDTH = 8


class Uses(nn.Module):
    """Linear layers of all fates: called, bypassed, rescaled, examined, behind a dead end, never called, frozen."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "bypassed", "in_training", "rescaled", "examined", "dead_end", "uncalled", "frozen"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)}) for _ in range(3))
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH)}) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.unread = nn.Parameter(torch.zeros(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.called(x), self.bypassed.weight, self.bypassed.bias)
        x = F.linear(x, self.in_training.weight, self.in_training.bias) if self.training else self.in_training(x)
        with torch.no_grad():
            self.rescaled.weight.mul_(1.0 if self.training else 0.5)
        x = self.examined(self.rescaled(x).to(self.examined.weight.dtype))
        self.dead_end(x)
        x = self.frozen(x) + torch.rand(()) + random.random() + np.random.rand()
        x = self.experts[1]["up"](x) + self.bias  # type: ignore[operator, index]
        for block in self.blocks:
            x = x + F.dropout(block["q"](x))  # type: ignore[index]
        return self.norm(x)


BYPASSED = "is bypassed: Uses computes with its weight and does not call it"


def watched(model: nn.Module, **options: Any) -> ModelUsage:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    return watch_usage(model, lambda m: m(x).square().sum(), **options)


def test_each_use_of_a_layer_is_told_from_the_others() -> None:
    usage = watched(Uses(), is_fresh=True)
    assert usage.unfit == {
        "bypassed": BYPASSED,
        "in_training": BYPASSED,
        "rescaled": "has a weight that the model itself writes in training",
        "dead_end": "gets no gradient: the loss does not depend on it",
        "uncalled": "gets no gradient: nothing calls it",
        "frozen": "is frozen by the model itself",
    }
    assert usage.examined == {"examined": "Uses"}
    names = {f"{layer}.{end}" for layer in ("dead_end", "uncalled") for end in ("weight", "bias")}
    assert usage.idle == names | {"unread"}
    assert usage.frozen == {"frozen.weight", "frozen.bias"}
    assert usage.routed, "experts 0 and 2 get a gradient from other batches"


def test_the_source_alone_tells_what_is_bypassed_wherever_the_code_runs() -> None:
    usage = usage_in_source(Uses())
    assert usage.unfit == dict.fromkeys(["bypassed", "in_training", "rescaled"], BYPASSED)
    assert usage.examined == {"examined": "Uses"}


def test_watching_leaves_no_trace() -> None:
    model = Uses().eval()
    model.called.weight.grad = torch.ones(WIDTH, WIDTH)
    gradient, state = model.called.weight.grad, copy.deepcopy(model.state_dict())
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    watched(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.called.weight.grad is gradient and model.bypassed.weight.grad is None
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert [type(module) for module in model.modules()] == classes
    assert not model.training and not any(module._forward_hooks for module in model.modules())


def test_what_the_model_does_not_use_is_left_out_with_a_reason_and_refused_by_name() -> None:
    x = torch.randn(4, WIDTH)

    def loss(model: nn.Module) -> Tensor:
        return model(x).square().sum()  # type: ignore[no-any-return]

    class Plain(Uses):
        """Without the layer that it writes to: that model is refused."""

        def __init__(self) -> None:
            super().__init__()
            self.rescaled = nn.Identity()  # type: ignore[assignment]
            self.rescaled.weight = torch.ones(())  # type: ignore[assignment]

    report = inject_lora(Plain(), CONFIG, example_loss=loss)
    called = {"called", "examined", "frozen", *(f"experts.{i}.up" for i in range(3)), "blocks.0.q", "blocks.1.q"}
    assert set(report.wrapped_layers) == called
    assert set(report.left_out) == {"bypassed", "in_training", "dead_end", "uncalled"}
    assert {"uncalled.weight", "dead_end.bias", "unread"} <= set(report.frozen_names)
    assert "not wrapped: bypassed is bypassed: Plain computes with its weight" in report.table()
    named = replace(CONFIG, target_modules=["called", "bypassed", "uncalled"])
    with pytest.raises(ValueError, match=r"target_modules: bypassed is bypassed.*\n.*uncalled gets no gradient"):
        inject_lora(Plain(), named, example_loss=loss)


def test_a_model_whose_evaluation_writes_its_weights_is_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.gain.data.div_(2)
            return self.layer(x) * self.gain  # type: ignore[no-any-return]

    model = Writes()
    usage = watched(model)
    assert usage.written == ("gain",) and model.gain.item() == 1
    [problem] = problems(model, CONFIG, usage)
    assert "writes 1 of its own parameters when it is evaluated, such as gain" in problem


class Encoder(nn.Module):
    """torch's own layers, whose inference path takes weights in place of calling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_run", [False, True])
def test_torchs_fast_paths_never_miss_a_factor(is_run: bool) -> None:
    model, x = Encoder(), torch.randn(2, 3, WIDTH)
    loss = (lambda m: m(x).square().sum()) if is_run else None
    report = inject_lora(model, CONFIG, example_loss=loss)
    assert set(report.wrapped_layers) == {"head"}
    assert set(report.left_out) == {"encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"} | {
        "attention.out_proj"
    }
    optimizer = build_optimizer(model, learning_rate=1e-2)
    model(x).square().sum().backward()
    optimizer.step()
    with_gradients = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), with_gradients, atol=1e-5, rtol=0)


def small(name: str, **settings: Any) -> nn.Module:
    """A causal language model of transformers, with two layers unless told otherwise."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 32, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**{**common, **settings})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def of_ids(model: nn.Module) -> Tensor:
    loss: Tensor = model(**batch()).loss
    return loss


INDEXED = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
EXPERTS = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
# Name -> (how to build it, the last parts of the layers that are left out for how they are used).
TELLING: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "llama": (lambda: build("llama"), set()),
    "gpt2": (lambda: build("gpt2"), set()),
    "bloom": (lambda: build("bloom"), set()),
    "falcon": (lambda: build("falcon"), set()),
    "mamba": (lambda: small("Mamba", state_size=8), {"x_proj", "dt_proj", "out_proj"}),
    "falcon_mamba": (lambda: small("FalconMamba", state_size=8), {"x_proj", "dt_proj", "out_proj"}),
    "mamba2": (lambda: small("Mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=1), {"out_proj"}),
    "deepseek_v32": (
        lambda: small("DeepseekV32", **INDEXED, **HEADS, **EXPERTS, index_n_heads=2, index_head_dim=16, index_topk=4),
        {"wq_b", "wk", "weights_proj"},
    ),
    "bart decoder": (
        lambda: small("Bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48).train(),
        {"k_proj", "v_proj", "q_proj", "out_proj"},
    ),
}


@pytest.mark.parametrize("name", TELLING)
def test_every_factor_moves_after_a_restart_in_architectures_that_bypass_layers(name: str) -> None:
    make, unused = TELLING[name]
    model = make()
    report = inject_lora(model, replace(CONFIG, r=4), example_loss=of_ids)
    left_out = {layer.rsplit(".", 1)[-1] for layer, why in report.left_out.items() if "head" not in why}
    assert left_out == unused
    optimizer = build_optimizer(model, learning_rate=1e-2)
    for index in (1, 2):
        for _ in range(2):
            optimizer.zero_grad()
            of_ids(model).backward()
            optimizer.step()
        assert without_gradient(model, "lora_A") == without_gradient(model, "lora_B") == set()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "it would stop DDP"
        restart(model, optimizer, seed=0, index=index)


def test_rwkv_is_refused_while_it_rescales_its_weights() -> None:
    def rwkv(rescale_every: int) -> nn.Module:
        return small("Rwkv", attention_hidden_size=32, rescale_every=rescale_every)

    model = rwkv(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"writes \d+ of its own parameters when it is evaluated, such as rwkv\.blocks"
    ):
        inject_lora(model, CONFIG, example_loss=of_ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert watch_usage(rwkv(0), of_ids).written == ()


@pytest.mark.parametrize("base_dtype", ["bfloat16", "int8", "nf4"])
def test_a_weight_whose_dtype_the_model_asks_for_is_stored_as_it_is(base_dtype: Any) -> None:
    """T5 casts activations to the dtype of `wo`: to bytes, or to bfloat16, where that is how W is stored."""
    model, seen = build("t5"), list[torch.dtype]()
    plain = model(**batch()).logits
    report = inject_lora(model, LoRAConfig(r=4, base_dtype=base_dtype))
    for name, layer in lora_layers(model).items():
        assert (layer.weight.dtype == torch.float32) == name.endswith(".wo")
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    logits = model(**batch()).logits
    assert set(seen) == {torch.float32} and len(seen) >= len(report.wrapped_layers)
    # The error of the stored weights, and not that of rounded activations.
    assert 0 < (logits - plain).abs().max() < 0.5 * plain.abs().max()
