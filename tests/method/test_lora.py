"""The wrapped layer and what gets wrapped, against PEFT where PEFT has the same thing."""

import copy
import io
import re
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora import LoRAConfig, build_optimizer, inject_lora, merge_lora
from relora.method.lora import LoRALinear, lora_layers
from relora.method.parameter_report import parameter_report
from relora.method.targets import last_parts
from tests.helpers.architectures import ARCHITECTURES, build
from tests.helpers.toy import CONFIG, Toy, factors, toy, trained

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")

LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear without bias": lambda: nn.Linear(12, 20, bias=False),
    "conv1d": lambda: Conv1D(20, 12),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_scale = pytest.mark.parametrize(
    "scale",
    [{"r": 4, "lora_alpha": 3.7}, {"r": 9, "lora_alpha": 5, "use_rslora": True}, {"r": 1, "lora_alpha": 1}],
)


def pair(layer: str, *, dropout: float = 0.0, **scale: Any) -> tuple[LoRALinear, Any]:
    """Our layer and PEFT's around equal plain layers, with the same A and B."""
    torch.manual_seed(0)
    plain = LAYERS[layer]()
    nn.init.normal_(plain.weight)
    holder = nn.Sequential(copy.deepcopy(plain))
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=dropout, fan_in_fan_out=layer == "conv1d", **scale)
    theirs = peft.inject_adapter_in_model(config, holder)[0]
    ours = LoRALinear.from_linear(plain, LoRAConfig(lora_dropout=dropout, **scale))
    nn.init.normal_(ours.lora_B, std=0.2)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    return ours, theirs


def gradients(layer: nn.Module, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of x, A and B."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 12, requires_grad=True)
    torch.manual_seed(2)
    y = layer(x)
    return y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), (x, A, B))


@every_layer
@every_scale
def test_forward_and_gradients_are_pefts(layer: str, scale: dict[str, Any]) -> None:
    ours, theirs = pair(layer, **scale)
    one = gradients(ours, ours.lora_A, ours.lora_B)
    other = gradients(theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    for mine, reference in zip(one, other, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-6)


@every_layer
@every_scale
def test_delta_is_pefts(layer: str, scale: dict[str, Any]) -> None:
    ours, theirs = pair(layer, **scale)
    torch.testing.assert_close(ours.delta(), theirs.get_delta_weight("default"), atol=1e-6, rtol=1e-6)
    assert ours.delta().shape == ours.weight.shape
    assert not ours.delta().requires_grad


@every_layer
def test_forward_is_that_of_the_merged_weight(layer: str) -> None:
    ours, _ = pair(layer, r=4, lora_alpha=3.7)
    x = torch.randn(5, 12)
    before = ours(x).detach()
    merged = merge_lora(nn.Sequential(ours))
    assert type(merged[0]) is type(LAYERS[layer]())
    torch.testing.assert_close(merged(x), before, atol=1e-5, rtol=0)


def test_dropout_is_pefts_and_only_while_training() -> None:
    ours, theirs = pair("linear", dropout=0.5, r=4, lora_alpha=3.7)
    x = torch.randn(64, 12)
    without, _ = pair("linear", r=4, lora_alpha=3.7)
    torch.manual_seed(3)
    mine = ours.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(mine, theirs.train()(x), atol=1e-6, rtol=1e-6)
    assert (mine - without(x)).abs().max() > 0.1
    assert not torch.equal(mine, ours(x))
    assert torch.equal(ours.eval()(x), without(x))


def test_from_linear_freezes_the_weight_where_it_is() -> None:
    plain = nn.Linear(12, 20)
    weight, bias = plain.weight, plain.bias
    ours = LoRALinear.from_linear(plain, LoRAConfig(r=4))
    assert ours.weight is weight and not weight.requires_grad
    assert ours.bias is bias and bias.requires_grad
    assert ours.to_linear() is plain and plain.weight is weight and plain.bias is bias


def test_a_bfloat16_weight_keeps_float32_factors() -> None:
    plain = nn.Linear(12, 20).bfloat16()
    ours = LoRALinear.from_linear(plain, LoRAConfig(r=4))
    assert (ours.weight.dtype, ours.lora_A.dtype, ours.lora_B.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    y = ours(torch.randn(3, 12, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert ours.lora_B.grad is not None and ours.lora_B.grad.dtype == torch.float32


def test_autocast_gives_bfloat16_and_float32_gradients() -> None:
    ours, _ = pair("linear", r=4, lora_alpha=3.7)
    x = torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), ours(x), atol=0.2, rtol=0.05)
    y.float().sum().backward()
    assert ours.lora_A.grad is not None and ours.lora_A.grad.dtype == torch.float32


# --- names and counts --------------------------------------------------------------------------------------


def test_the_frozen_weight_keeps_its_name_and_its_place() -> None:
    model = toy()
    before = dict(model.named_parameters())
    inject_lora(model, CONFIG)
    after = dict(model.named_parameters())
    new = {f"{name}.{factor}" for name in ("inner", "conv", "outer") for factor in ("lora_A", "lora_B")}
    assert set(after) == set(before) | new
    assert all(after[name] is p for name, p in before.items())
    assert set(model.state_dict()) == set(after)
    assert {name for name, p in after.items() if not p.requires_grad} == {f"{n}.weight" for n in lora_layers(model)}


def test_merging_puts_the_parameters_back_and_they_can_be_wrapped_again() -> None:
    model, _ = trained()
    weights = {name: layer.weight for name, layer in lora_layers(model).items()}
    merge_lora(model)
    assert set(model.state_dict()) == set(toy().state_dict())
    assert all(model.get_submodule(name).weight is weight for name, weight in weights.items())
    assert set(inject_lora(model, CONFIG).wrapped_layers) == set(weights)


def test_a_wrapped_model_can_be_copied_and_its_state_loaded() -> None:
    model, _ = trained()
    x = torch.randn(4, 12)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(merge_lora(twin)(x), merge_lora(copy.deepcopy(model))(x))

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = toy()
    inject_lora(other, CONFIG, seed=5)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), model(x))


def test_the_report_counts_parameters_and_bytes() -> None:
    model = toy()
    model.outer.bfloat16()
    report = inject_lora(model, LoRAConfig(r=3, target_modules=["inner", "outer"], modules_to_save=["norm"]))
    assert report.wrapped_layers == {"inner": (20, 12), "outer": (10, 16)}
    assert (report.wrapped.num_tensors, report.wrapped.num_parameters) == (2, 240 + 160)
    assert report.wrapped.num_bytes == 240 * 4 + 160 * 2
    assert (report.factors.num_tensors, report.factors.num_parameters) == (4, 3 * (32 + 26))
    assert report.factors.num_bytes == 4 * report.factors.num_parameters
    assert (report.full.num_tensors, report.full.num_parameters) == (2, 40)
    assert (report.frozen.num_tensors, report.frozen.num_parameters) == (3, 20 + 320 + 16)
    assert report.frozen_names == ["inner.bias", "conv.weight", "conv.bias"]
    assert report.factors.num_parameters + report.full.num_parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert report.as_dict()["factors"]["num_parameters"] == report.factors.num_parameters


def test_the_report_counts_a_tied_parameter_once() -> None:
    model = build("llama_tied")
    report = parameter_report(model)
    assert report.full.num_parameters == sum({id(p): p.numel() for p in model.parameters()}.values())


def test_a_model_on_the_meta_device_can_be_injected() -> None:
    with torch.device("meta"):
        model = Toy()
    on_cpu = toy()
    report = inject_lora(model, CONFIG)
    assert report == inject_lora(on_cpu, CONFIG)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in on_cpu.named_parameters()}


def test_factors_have_a_parameter_group_of_their_own() -> None:
    model, _ = trained()
    groups = {group["name"]: group for group in build_optimizer(model, weight_decay=0.1).param_groups}
    of_factors = {id(p) for p in factors(model).values()}
    assert {id(p) for p in groups["lora"]["params"]} == of_factors
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in groups.values() for p in group["params"]) == sorted(trainable)
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "lora": 0.1,
        "full_no_decay": 0,
    }


# --- which layers: PEFT's rules ----------------------------------------------------------------------------

TARGETS: list[tuple[str, Any]] = [
    *[(name, "all-linear") for name in ARCHITECTURES],
    ("llama", ["q_proj", "v_proj"]),
    ("llama", ["self_attn.q_proj", "mlp.down_proj"]),
    ("llama", ["model.layers.1.self_attn.q_proj"]),
    ("llama", r".*\.(q|k)_proj"),
    ("llama", r".*layers\.1\..*_proj"),
    ("llama", r"model\.layers\.0\.mlp\.(gate|up)_proj"),
    ("llama", ["lm_head", "q_proj"]),
    ("gpt2", ["c_attn", "c_proj"]),
    ("gpt2", ["mlp.c_proj"]),
    ("gpt2", r".*\.attn\.c_.*"),
    ("gpt_neox", ["query_key_value"]),
    ("opt", ["fc1", "project_in"]),
    ("falcon", ["query_key_value", "dense"]),
    ("t5", ["q", "v"]),
    ("t5", r"decoder\..*\.(q|wo)"),
    ("mixtral", ["q_proj", "o_proj"]),
]


@pytest.mark.parametrize(("name", "target_modules"), TARGETS)
def test_target_modules_select_what_peft_selects(name: str, target_modules: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=target_modules)
    theirs = set(peft.get_peft_model(build(name), config).targeted_module_names)
    report = inject_lora(build(name), LoRAConfig(r=2, target_modules=target_modules))
    assert set(report.wrapped_layers) == theirs


def trained_by_peft(name: str, **options: Any) -> set[str]:
    """Names of the parameters that PEFT trains beside its factors."""
    model = peft.get_peft_model(build(name), peft.LoraConfig(r=2, **options))
    names = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    plain = {re.sub(r"modules_to_save\.default\.", "", n.removeprefix("base_model.model.")) for n in names}
    return {n.replace(".base_layer.", ".") for n in plain}


def trained_by_us(name: str, **options: Any) -> set[str]:
    model = build(name)
    inject_lora(model, LoRAConfig(r=2, **options))
    of_factors = {id(p) for p in factors(model).values()}
    return {n for n, p in model.named_parameters() if p.requires_grad and id(p) not in of_factors}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize(
    ("name", "target_modules"), [("gpt2", ["c_attn"]), ("opt", ["q_proj", "fc1"]), ("llama_tied", ["q_proj"])]
)
def test_bias_trains_the_biases_that_peft_trains(name: str, target_modules: Any, bias: Any) -> None:
    ours = trained_by_us(name, bias=bias, target_modules=target_modules)
    assert ours == trained_by_peft(name, bias=bias, target_modules=target_modules)
    assert bool(ours) == (bias != "none")


@pytest.mark.parametrize("modules_to_save", [["embed_tokens"], ["lm_head", "model.norm"], ["k_proj"], None])
def test_modules_to_save_train_what_peft_trains(modules_to_save: Any) -> None:
    options = {"modules_to_save": modules_to_save, "target_modules": ["q_proj", "v_proj"]}
    assert trained_by_us("llama", **options) == trained_by_peft("llama", **options)


def test_a_layer_to_save_is_not_wrapped() -> None:
    model = build("llama")
    report = inject_lora(model, LoRAConfig(r=2, modules_to_save=["down_proj"]))
    assert not any("down_proj" in name for name in report.wrapped_layers)
    assert all(p.requires_grad for name, p in model.named_parameters() if "down_proj" in name)


def test_a_tied_head_to_save_trains_the_embedding_it_is_tied_to() -> None:
    assert trained_by_us("llama_tied", modules_to_save=["lm_head"]) == {"model.embed_tokens.weight"}


# --- what is refused, with the model as it was -------------------------------------------------------------


def assert_refused(name: str, message: str, options: dict[str, Any], **more: Any) -> None:
    model = build(name)
    before = {key: (type(m), m.training) for key, m in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**{"r": 4, **options}), **more)
    assert {key: (type(m), m.training) for key, m in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_no_match_lists_the_candidates() -> None:
    llama = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    assert_refused("llama", f"'query'.*matches no linear layer; candidates: {llama}", {"target_modules": ["query"]})
    assert_refused("llama", f"q_proj.*; candidates: {llama}", {"target_modules": "q_proj"})  # a regex is whole
    assert_refused("gpt2", "candidates: c_attn, c_fc, c_proj, lm_head", {"target_modules": ["q_proj"]})
    assert_refused("llama", "matches no linear layer", {"target_modules": ["embed_tokens"]})
    assert_refused("llama", "matches no linear layer", {"target_modules": ["proj"]})  # a suffix is whole parts


def test_one_entry_without_a_match_is_refused_by_name() -> None:
    assert_refused("llama", r"\['v_porj'\] matches no linear", {"target_modules": ["q_proj", "v_porj"]})


def test_the_candidates_of_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="has no nn"):
        inject_lora(nn.Sequential(nn.LayerNorm(4)), LoRAConfig(r=2))


def test_a_rank_larger_than_a_layer_is_refused() -> None:
    message = r"0\.self_attn\.k_proj has a smaller side of 16, less than r = 17 \(and 1 more\)"
    assert_refused("llama", message, {"r": 17, "target_modules": ["q_proj", "k_proj"]})
    assert_refused("llama", r"'all-linear' leaves no layer to wrap: .*side of 32, less than r = 33", {"r": 33})
    inject_lora(build("llama"), LoRAConfig(r=16, target_modules=["q_proj", "k_proj"]))


def test_a_tied_head_as_a_target_is_refused() -> None:
    message = r"lm_head is tied \(.*embed_tokens\.weight.*\),? and wrapping it would break the tie"
    assert_refused("llama_tied", message, {"target_modules": ["lm_head", "q_proj"]})


def test_a_layer_that_stands_in_two_places_is_refused() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(ValueError, match="0 is tied"):
        inject_lora(model, LoRAConfig(r=2))
    assert model[0] is model[2] is shared


def test_all_problems_are_listed_at_once() -> None:
    options = {"r": 17, "target_modules": ["lm_head", "k_proj", "q_porj"]}
    assert_refused("llama_tied", r"(?s)q_porj.*k_proj has a smaller side of 16.*lm_head is tied", options)


def test_modules_to_save_that_stand_for_nothing_are_refused() -> None:
    assert_refused("llama", r"\['embeddings'\] matches no module; .*embed_tokens", {"modules_to_save": ["embeddings"]})


def test_an_unknown_reinit_is_refused() -> None:
    assert_refused("llama", "reinit = gaussian: must be", {}, reinit="gaussian")


def test_injecting_twice_is_refused() -> None:
    model, _ = trained()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="has LoRA layers already"):
        inject_lora(model, CONFIG)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}


def test_merging_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no LoRA layers to merge"):
        merge_lora(toy())
    model, _ = trained()
    merge_lora(model)
    with pytest.raises(ValueError, match="no LoRA layers to merge"):
        merge_lora(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be >= 1, not 0"),
        ({"lora_alpha": 0}, "lora_alpha must be > 0, not 0"),
        ({"lora_dropout": 1.0}, "lora_dropout .* not 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout .* not -0.1"),
        ({"bias": "some"}, "bias .* not 'some'"),
        ({"target_modules": []}, "target_modules must not be empty"),
        ({"target_modules": ""}, "target_modules must not be empty"),
        ({"r": 0, "bias": "some"}, "(?s)r must be.*bias must be"),
    ],
)
def test_impossible_configs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_an_optimizer_needs_something_to_train_and_a_name_it_knows() -> None:
    model = toy().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model)
    with pytest.raises(ValueError, match="optimizer = sgd: must be"):
        build_optimizer(toy(), name="sgd")


def test_candidates_are_listed_by_their_last_part() -> None:
    assert last_parts(["a.q", "b.q", "a.0", "k", "h.3.k", "2"]) == ["2", "a.0", "k", "q"]
