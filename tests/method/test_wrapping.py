"""Wrapping changes nothing else: hooks, attributes, dtypes, devices and state are kept, or the layer is refused."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.integrations.flash_attention import get_target_dtype
from transformers.pytorch_utils import Conv1D

from relora import LoRAConfig, build_optimizer, inject_lora, merge_lora, restart
from relora.method.delta import full_precision, lora_delta
from relora.method.inject import problems
from relora.method.lora import LoRALinear, lora_layers
from relora.method.names import named_parameters
from relora.method.optimizer import parameter_groups
from relora.method.reinit import DrawKey, LayerView, Reinit
from relora.method.usage import ModelUsage
from tests.helpers.architectures import build
from tests.helpers.toy import CONFIG, Toy, toy, trained, update

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")

COARSE = ("bfloat16", "int8", "nf4")
every_coarse = pytest.mark.parametrize("base_dtype", COARSE)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All by which a refusal could change a model: modules, modes, parameters, values."""
    found: dict[str, Any] = {f"module {name}": (id(module), module.training) for name, module in model.named_modules()}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (id(p), p.requires_grad, p.detach().double().sum().item())
    return found | {"attributes": sorted(vars(model))}


def assert_refused(model: nn.Module, config: Any, message: str, error: type[Exception] = ValueError) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject_lora(model, config)
    assert snapshot(model) == before


# --- hooks, modes and attributes ----------------------------------------------------------------------------


def hooked(model: Toy) -> tuple[Toy, list[str], list[Any]]:
    """A model with a hook of every kind on its layer `inner`, a list of the calls, and the handles."""
    calls, inner = list[str](), model.inner

    def forward_hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        calls.append("forward")
        return y * torch.linspace(1, 2, 20)

    def pre_hook(_: nn.Module, arguments: Any, keywords: Any) -> Any:
        calls.append("pre")
        return (arguments[0] + 1,), keywords

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        inner.register_forward_hook(forward_hook),
        inner.register_forward_pre_hook(pre_hook, with_kwargs=True),
        inner.register_full_backward_hook(note("backward")),
        inner.register_full_backward_pre_hook(note("backward pre")),
        inner.register_state_dict_post_hook(note("state")),
    ]
    return model, calls, handles


def test_a_wrapped_layer_keeps_its_hooks_and_gives_them_back() -> None:
    model, calls, handles = hooked(toy())
    x = torch.randn(4, 12, requires_grad=True)
    before = model(x).detach()
    inject_lora(model, CONFIG)
    calls.clear()
    y = model(x)
    torch.testing.assert_close(y, before)
    y.sum().backward()
    model.state_dict()
    assert calls == ["pre", "forward", "backward pre", "backward", "state"]
    # Handles from before wrapping still work, and hooks that were set since are given back too.
    handles[0].remove()
    late = model.inner.register_forward_hook(lambda *arguments: arguments[2] * torch.linspace(3, 1, 20))
    wrapped = model(x).detach()
    assert (wrapped - before).abs().max() > 0.1
    merge_lora(model)
    assert type(model.inner) is nn.Linear
    torch.testing.assert_close(model(x).detach(), wrapped)
    late.remove()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(x), _plain_twin(model)(x))


def _plain_twin(model: Toy) -> Toy:
    twin = toy()
    twin.load_state_dict(model.state_dict())
    return twin


def test_attributes_and_modes_are_kept() -> None:
    model = toy()
    model.inner.note, model.inner.block = "mine", 3
    model.conv.eval()
    model.inner.weight.note = model.conv.weight.note = "of the weight"
    inject_lora(model, replace(CONFIG, lora_dropout=0.5, base_dtype="nf4"))
    assert model.inner.weight.note == model.conv.weight.note == "of the weight"
    layer = lora_layers(model)["inner"]
    assert (layer.note, layer.training, isinstance(layer, nn.Linear)) == ("mine", True, True)
    assert [module.training for module in model.conv.modules()] == [False, False]
    assert (model.conv.nf, model.conv.nx) == (16, 20)
    layer.note, layer.later = "changed", 5
    del layer.block
    merge_lora(model)
    assert (model.inner.note, model.inner.later, model.conv.training) == ("changed", 5, False)
    assert model.inner.weight.note == model.conv.weight.note == "of the weight"
    assert not {"block", "scale", "r", "_own", "_plain"} & vars(model.inner).keys()
    assert vars(model).keys() == vars(toy()).keys()


def test_a_copy_of_a_hooked_model_has_its_hooks() -> None:
    model, calls, _ = hooked(toy())
    inject_lora(model, CONFIG)
    twin = merge_lora(copy.deepcopy(model))
    calls.clear()
    twin(torch.randn(1, 12))
    assert calls == ["pre", "forward"]


def own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


def own_parameter(layer: nn.Linear) -> None:
    layer.gain = nn.Parameter(torch.ones(1))


class Scaled(nn.Linear):
    def scaled(self) -> Tensor:
        return 2 * self.weight


def own_class(layer: nn.Linear) -> None:
    layer.__class__ = Scaled


UNKEPT: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "forward": (own_forward, "has a forward of its own, set on this instance"),
    "parameter": (own_parameter, r"holds more than a weight and a bias \(gain\)"),
    "method": (own_class, r"is a Scaled, with methods of its own \(scaled\)"),
    "weight_norm": (parametrizations.weight_norm, "is computed at each use"),
    "bias": (lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()), "is computed at each use"),
    "loading": (
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
        "has a hook on loading its state",
    ),
}


@pytest.mark.parametrize("kind", UNKEPT)
def test_what_cannot_be_kept_is_refused_by_name_or_left_out_with_the_reason(kind: str) -> None:
    change, reason = UNKEPT[kind]
    model = toy()
    change(model.inner)
    assert_refused(model, CONFIG, f"target_modules: inner .*{reason}")
    inner = model.inner
    report = inject_lora(model, LoRAConfig(r=3))
    assert set(report.wrapped_layers) == {"conv", "outer"} and set(report.left_out) == {"inner"}
    assert model.inner is inner
    assert "not wrapped: inner " in report.table()


# --- what is left out, and what is refused ------------------------------------------------------------------


def test_the_whole_model_is_no_target() -> None:
    for model in (nn.Linear(6, 6), Conv1D(6, 6)):
        for target_modules in ("all-linear", ".*", [""]):
            config = LoRAConfig(r=2, target_modules=target_modules)
            assert_refused(model, config, "the model is itself the layer to wrap: .* nn.Sequential")


class Narrow(nn.Module):
    """A gate with one output beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.body = nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.sigmoid(self.gate(x)) * self.body(x)
        return y


def test_a_narrow_layer_does_not_keep_others_from_being_wrapped() -> None:
    report = inject_lora(Narrow(), LoRAConfig(r=4, modules_to_save="rest"))
    assert set(report.wrapped_layers) == {"body"}
    assert report.left_out == {"gate": "has a smaller side of 1, less than r = 4"}
    assert report.full.num_parameters == 9 + 8
    assert_refused(
        Narrow(), LoRAConfig(r=4, target_modules=["gate", "body"]), "target_modules: gate has a smaller side"
    )


def test_a_caller_can_leave_layers_out() -> None:
    unfit = {"body": "is never called"}
    model = Narrow()
    report = inject_lora(model, LoRAConfig(r=1), usage=ModelUsage(unfit=unfit))
    assert (set(report.wrapped_layers), report.left_out) == ({"gate"}, unfit)
    named = LoRAConfig(r=1, target_modules=["body"])
    assert problems(Narrow(), named, ModelUsage(unfit=unfit)) == ["target_modules: body is never called"]


class Colliding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(6), nn.Linear(6, 6)
        self.module = nn.ModuleDict({"norm": nn.LayerNorm(6)})


def test_two_names_that_are_one_are_refused() -> None:
    model = Colliding()
    assert_refused(model, LoRAConfig(r=2), r"two tensors have one name, norm.weight: norm.weight, module.norm.weight")
    with pytest.raises(ValueError, match=r"two tensors have one name, norm\.weight"):
        named_parameters(model)
    with pytest.raises(ValueError, match="two tensors have one name"):
        build_optimizer(model)


def test_models_of_peft_and_its_config_are_refused() -> None:
    theirs = peft.LoraConfig(r=2, target_modules=["q_proj"])
    assert_refused(build("llama"), theirs, r"must be a relora.LoRAConfig.*not a peft.*LoraConfig", TypeError)
    assert_refused(build("llama"), {"r": 2}, "not a builtins.dict", TypeError)
    for model in (peft.get_peft_model(build("llama"), theirs), peft.inject_adapter_in_model(theirs, build("llama"))):
        assert_refused(model, LoRAConfig(r=2), "has adapters of PEFT .*merge_and_unload")
    inject_lora(peft.get_peft_model(build("llama"), theirs).unload(), LoRAConfig(r=2))


@pytest.mark.parametrize("base_dtype", ["float32", "nf4"])
def test_a_weight_that_no_format_holds_is_refused(base_dtype: Any) -> None:
    message = f"base_dtype = {base_dtype} would round inner, which is float64, for good"
    assert_refused(toy().double(), replace(CONFIG, base_dtype=base_dtype), message)


def test_tensors_that_cannot_train_are_refused() -> None:
    model = toy()
    with torch.inference_mode():
        assert problems(model, CONFIG) == problems(Toy(), CONFIG) != []
        made = Toy()
    with pytest.raises(ValueError, match=r"under torch\.inference_mode: such tensors can never train"):
        inject_lora(made, CONFIG)


def test_candidates_of_a_list_are_named() -> None:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))})
    assert_refused(model, LoRAConfig(r=2, target_modules=["fc"]), "candidates: mlp.0, mlp.2$")
    inject_lora(model, LoRAConfig(r=2, target_modules=["mlp.0"]))


class Failing(Reinit):
    """Draws B != 0 for the first layer, and fails at the second."""

    def factors(self, layer: LayerView, key: DrawKey, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        A, B = torch.ones(layer.r, layer.in_features), torch.ones(layer.out_features, layer.r)
        return A, B if key.name == "inner" else B * torch.nan


@pytest.mark.parametrize("base_dtype", [None, "nf4"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(base_dtype: Any) -> None:
    model, x = toy(), torch.randn(4, 12)
    model.norm.requires_grad_(False)
    before, y = snapshot(model), model(x)
    with pytest.raises(RuntimeError, match="not finite"):
        inject_lora(model, replace(CONFIG, base_dtype=base_dtype), reinit=Failing())
    torch.testing.assert_close(model(x), y)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        name: p.requires_grad for name, p in toy().named_parameters()
    } | {"norm.weight": False, "norm.bias": False}
    if base_dtype is None:
        assert [key for key in before if key.startswith("module")] == [
            key for key in snapshot(model) if key.startswith("module")
        ]
        assert {type(module) for module in model.modules()} == {type(module) for module in toy().modules()}


def test_factors_that_are_not_finite_are_not_merged() -> None:
    model, _ = trained()
    with torch.no_grad():
        model.outer.lora_A[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"not finite.*outer\.lora_A"):
        merge_lora(model)
    assert all(isinstance(layer, LoRALinear) for layer in (model.inner, model.conv, model.outer))
    assert all(
        torch.equal(a, b) or name == "outer.lora_A"
        for (name, a), b in zip(before.items(), model.state_dict().values(), strict=True)
    )


# --- heads --------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {
    "llama, sequence": (
        "LlamaConfig",
        "AutoModelForSequenceClassification",
        {"vocab_size": 64, "pad_token_id": 0},
        "score",
    ),
    "llama, tokens": ("LlamaConfig", "AutoModelForTokenClassification", {"vocab_size": 64}, "score"),
    "llama, answers": ("LlamaConfig", "AutoModelForQuestionAnswering", {"vocab_size": 64}, "qa_outputs"),
    "bert, sequence": ("BertConfig", "AutoModelForSequenceClassification", {"vocab_size": 64}, "classifier"),
    "bert, answers": ("BertConfig", "AutoModelForQuestionAnswering", {"vocab_size": 64}, "qa_outputs"),
    "roberta, sequence": ("RobertaConfig", "AutoModelForSequenceClassification", {"vocab_size": 64}, "classifier"),
    "vit": ("ViTConfig", "AutoModelForImageClassification", {"image_size": 8, "patch_size": 4}, "classifier"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_fresh_head_trains_in_full(kind: str) -> None:
    config_name, factory, options, head = HEADS[kind]
    config = getattr(transformers, config_name)(**SIZES, **options, num_labels=2)
    model = getattr(transformers, factory).from_config(config)
    report = inject_lora(model, LoRAConfig(r=4))
    assert report.wrapped_layers and not any(name.split(".")[0] == head for name in report.wrapped_layers)
    assert {name.split(".")[0] for name in report.left_out} == {head}
    full = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert full == {name for name, _ in model.named_parameters() if name.startswith(f"{head}.")} != set()
    merge_lora(model)
    # Nothing trains in full where nothing is asked to; a head that is a target by name is wrapped.
    assert inject_lora(model, LoRAConfig(r=4, modules_to_save=())).full.num_tensors == 0
    merge_lora(model)
    last = next(iter(report.left_out))
    assert last in inject_lora(model, LoRAConfig(r=2, target_modules=[last])).wrapped_layers


# --- dtypes and devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", [None, "float32", *COARSE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_that_changes_after_wrapping_is_that_of_the_merged_model(base_dtype: Any, dtype: torch.dtype) -> None:
    model, _ = trained(3, replace(CONFIG, base_dtype=base_dtype))
    layer = lora_layers(model)["inner"]
    W = layer.weight.detach().clone() if layer.master is None else layer.master.values.view(20, 12).clone()
    delta = lora_delta(layer.lora_A.detach().double(), layer.lora_B.detach().double(), layer.scale, transposed=False)
    model.to(dtype)
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {torch.promote_types(dtype, torch.float32)}
    assert layer.master is None or (layer.master.values.dtype, layer.master.values.device.type) == (
        torch.float32,
        "cpu",
    )
    stored = {None: dtype, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(base_dtype, torch.uint8)
    assert layer.weight.dtype == stored
    if dtype != torch.float16:  # a CPU multiplies it slowly, if at all
        model(torch.randn(2, 12, dtype=dtype)).sum().backward()
    if base_dtype is None:
        W = W.to(dtype)
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = (W.double() + delta).to(dtype)
    torch.testing.assert_close(model.inner.weight, expected, rtol=2e-7 if dtype == torch.float64 else 1e-6, atol=1e-7)


def test_a_master_is_not_dragged_to_a_device() -> None:
    model = toy()
    inject_lora(model, replace(CONFIG, base_dtype="nf4"))
    model.to("meta")
    layer = lora_layers(model)["inner"]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert layer.master is not None and layer.master.values.device.type == "cpu" and layer.master.values.any()


def test_code_that_asks_a_module_for_a_linear_layer_finds_one() -> None:
    model = build("llama").bfloat16()
    attention = model.model.layers[0].self_attn
    query = torch.zeros(1)
    before = get_target_dtype(query, attention)
    inject_lora(model, LoRAConfig(r=2))
    assert get_target_dtype(query, attention) == before == torch.bfloat16


@pytest.mark.parametrize("layer", ["inner", "conv"])
def test_a_wrapped_weight_that_trains_gets_its_gradient_under_dropout(layer: str) -> None:
    gradients = []
    for dropout in (0.0, 0.5):
        model = toy()
        inject_lora(model, replace(CONFIG, lora_dropout=dropout))  # B = 0: whatever is dropped does not count
        weight = model.get_submodule(layer).weight.requires_grad_()
        model(torch.linspace(-1, 1, 48).view(4, 12)).square().sum().backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_weight_that_trains_beside_its_master_is_not_merged() -> None:
    model, optimizer = coarse("bfloat16")
    model.inner.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"inner\.weight trains, but its master does not"):
        restart(model, optimizer, seed=0, index=2)
    with pytest.raises(ValueError, match=r"inner\.weight trains, but its master does not"):
        merge_lora(model)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_an_update_is_formed_in_full_precision_on_every_device(precision: str) -> None:
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        before = [backend.fp32_precision for backend in backends]
        assert "ieee" not in before
        with full_precision("cpu"):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert [backend.fp32_precision for backend in backends] == before
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(asked)


# --- state --------------------------------------------------------------------------------------------------


def coarse(base_dtype: Any, *, seed: int = 0) -> tuple[Toy, Any]:
    """A model whose exact weights are finer than its stored ones: after an update and a restart, and an update more."""
    model = toy()
    inject_lora(model, replace(CONFIG, base_dtype=base_dtype), seed=seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.0), lr=1e-2)
    update(model, optimizer, 2)
    restart(model, optimizer, seed=0, index=1)
    update(model, optimizer, 2)
    return model, optimizer


def exact(model: nn.Module) -> dict[str, Tensor]:
    """The weights with their updates, exact."""
    found = {}
    for name, layer in lora_layers(model).items():
        W = layer.weight.detach() if layer.master is None else layer.master.values.view(layer.weight_format.shape)
        found[name] = W + layer.delta()
    return found


def assert_exact(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, W in exact(model).items():
        torch.testing.assert_close(W, expected[name], rtol=0, atol=0)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


@every_coarse
@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_a_wrapped_model_holds_the_masters(base_dtype: Any, assign: bool) -> None:
    model, optimizer = coarse(base_dtype)
    expected, x = exact(model), torch.randn(4, 12)
    other = toy()
    inject_lora(other, replace(CONFIG, base_dtype=base_dtype), seed=5)
    other.load_state_dict(through_a_file(model.state_dict()), assign=assign)
    assert_exact(other, expected)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    restart(other, build_optimizer(other), seed=0, index=2, optimizer_reset="keep")
    torch.testing.assert_close(merge_lora(other).inner.weight, expected["inner"], rtol=0, atol=0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_exact(twin, expected)
        assert twin.inner.master.values.data_ptr() != model.inner.master.values.data_ptr()
    assert optimizer is not None


@every_coarse
@pytest.mark.parametrize("saved_dtype", [None, "nf4"])
def test_a_model_without_values_takes_a_state(base_dtype: Any, saved_dtype: Any) -> None:
    model, _ = coarse(saved_dtype)
    with torch.device("meta"):
        other = Toy()
    inject_lora(other, replace(CONFIG, base_dtype=base_dtype))
    other.load_state_dict(model.state_dict(), assign=True)
    assert_exact(other, exact(model))
    assert other(torch.randn(2, 12)).isfinite().all()
    torch.testing.assert_close(merge_lora(other).inner.weight, exact(model)["inner"], rtol=0, atol=0)


@every_coarse
def test_a_state_is_read_whatever_stores_the_weights(base_dtype: Any) -> None:
    model, _ = coarse(base_dtype)
    expected = exact(model)
    for other_dtype in (None, "float32", *COARSE):
        other = toy()
        inject_lora(other, replace(CONFIG, base_dtype=other_dtype))
        other.load_state_dict(model.state_dict())
        assert_exact(other, expected)
        back = toy()
        inject_lora(back, replace(CONFIG, base_dtype=base_dtype))
        back.load_state_dict(other.state_dict())
        assert_exact(back, expected)
        layer = lora_layers(back)["conv"]
        torch.testing.assert_close(
            layer.weight, layer.weight_format.quantize(layer.master.values.view(20, 16)), rtol=0, atol=0
        )


@every_coarse
def test_a_state_that_lost_the_masters_is_refused(base_dtype: Any) -> None:
    model, _ = coarse(base_dtype)
    state = {name: values for name, values in model.state_dict().items() if not name.endswith("master")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"inner.master", "conv.master"'):
        model.load_state_dict(state)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for inner.master: \(3, 4\) in the state, \(20, 12\)"):
        model.load_state_dict(state | {"inner.master": torch.zeros(3, 4)})


# --- the cache ----------------------------------------------------------------------------------------------

CACHED = replace(CONFIG, forward="merged", keep_merged=True)


def test_an_evaluation_in_inference_mode_does_not_end_the_training() -> None:
    model, optimizer = trained(1, CACHED)
    for span in ("pass", "update"):
        for layer in lora_layers(model).values():
            layer.cache_span = span
        with torch.inference_mode():
            model(torch.randn(4, 12))
        update(model, optimizer)


def test_no_write_leaves_a_stale_cache() -> None:
    """Weights of an average, put in and taken out through .data, and a step written by hand."""
    model, _ = trained(1, CACHED)
    x = torch.randn(8, 12)

    def uncached() -> Tensor:
        twin = toy()
        inject_lora(twin, CONFIG)
        twin.load_state_dict(model.state_dict())
        y: Tensor = twin(x).detach()
        return y

    outputs = [model(x).detach()]
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), uncached())
        for p in model.parameters():
            p.data.mul_(1.1)
        torch.testing.assert_close(model(x), uncached())
    loss = model(x).square().sum()
    loss.backward()
    for p in model.parameters():
        if p.grad is not None:
            p.data.sub_(1e-2 * p.grad)
    outputs.append(model(x).detach())
    torch.testing.assert_close(outputs[1], uncached())
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


def test_an_averaged_copy_computes_with_its_average() -> None:
    model, optimizer = trained(1, CACHED)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    x, expected = torch.randn(4, 12), copy.deepcopy(model)
    for _ in range(2):
        average(x).sum().backward()
        update(model, optimizer)
        average.update_parameters(model)
    with torch.no_grad():
        for (name, p), q in zip(average.module.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q) != (p.requires_grad), name
            q.copy_(p)
        torch.testing.assert_close(average(x), expected(x))


def test_gradients_with_the_cache_are_those_without() -> None:
    found = []
    for keep in (True, False):
        model, _ = trained(1, replace(CACHED, keep_merged=keep))
        model(torch.linspace(-1, 1, 48).view(4, 12)).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
