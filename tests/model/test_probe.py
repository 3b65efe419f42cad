"""A model is run once before it is trained: that decides what is wrapped and what trains, or that it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from relora.config import Config, UserError, check
from relora.method.lora import lora_layers, wrapped_names
from relora.method.usage import ModelUsage, usage_of_wrapped
from relora.model import probe as probe_module
from relora.model.model import empty_model, load_hf_config
from relora.model.probe import probe
from relora.model.tasks import CausalLM
from relora.train.preflight import check_model, preflight
from relora.train.stages import Stage, make_trainable
from relora.train.train import train
from tests.helpers.tiny import MODEL, only
from tests.helpers.tiny import metrics as metrics_of

Settings = Callable[..., dict[str, Any]]
SIZE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
ROWS = {"num_attention_heads": 4, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": MODEL,
    "mamba": {"model_type": "mamba", **SIZE, "state_size": 8},
    "mixtral": {"model_type": "mixtral", **SIZE, **ROWS, "num_key_value_heads": 2, "num_local_experts": 4},
    "rwkv": {"model_type": "rwkv", **SIZE, "attention_hidden_size": 32, "rescale_every": 1},
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        **SIZE,
        **ROWS,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 0,
    },
    "roformer": {"model_type": "roformer", **SIZE, **ROWS, "is_decoder": True, "embedding_size": 32},
    "bart": {
        "model_type": "bart",
        "vocab_size": 300,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "is_decoder": True,
        "is_encoder_decoder": False,
        "max_position_embeddings": 64,
    },
}
CROSS = {f"model.decoder.layers.{i}.encoder_attn.{one}_proj" for i in range(2) for one in ("q", "k", "v", "out")}


@pytest.fixture
def settings(tiny_run: Settings) -> Callable[..., Config]:
    def of_model(name: str, **overrides: Any) -> Config:
        model = {"config": MODELS[name], "attn_implementation": "eager"}  # some have no other
        return check(tiny_run(model=model, data__document_mask=False, **overrides))

    return of_model


def usage_of(config: Config) -> ModelUsage:
    usage, problems = check_model(config, load_hf_config(config.model, CausalLM()), CausalLM())
    assert problems == []
    return usage


def trained_by(config: Config, usage: ModelUsage, *, low_rank: bool) -> set[str]:
    """Names of the parameters that a stage trains."""
    model = empty_model(config.model, load_hf_config(config.model, CausalLM()), CausalLM())
    make_trainable(model, Stage("low_rank" if low_rank else "full_rank", 1), config, usage)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_probe_is_the_same_everywhere_and_draws_nothing(settings: Callable[..., Config]) -> None:
    config = settings("mixtral")
    state = torch.get_rng_state()
    first = usage_of(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert usage_of(config) == first == ModelUsage(examined=first.examined)


@pytest.mark.parametrize("name", ["llama", "mamba", "mixtral", "ernie4_5_moe", "bart"])
def test_a_model_too_large_to_draw_shows_the_same(
    name: str, settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = usage_of(settings(name))
    monkeypatch.setattr(probe_module, "MOST_DRAWN", 0)
    assert usage_of(settings(name)) == drawn
    assert drawn.not_run is None


def test_a_mamba_trains_through_restarts_and_is_exported(settings: Callable[..., Config]) -> None:
    config = settings("mamba", training__max_steps=8, training__save_steps=4, relora__warm_start_steps=0)
    train(config)
    folder = Path(config.output_dir)
    report = json.loads((folder / "parameters_low_rank.json").read_text())
    assert {name.rsplit(".", 1)[-1] for name in report["wrapped_layers"]} == {"in_proj"}
    bypassed = {name.rsplit(".", 1)[-1] for name, why in report["left_out"].items() if "MambaMixer computes" in why}
    assert bypassed == {"x_proj", "dt_proj", "out_proj"} and report["frozen_names"] == []
    lines = metrics_of(folder)
    assert [line["step"] for line in lines if "restart" in line] == [3, 6]
    losses = only(lines, "eval_loss")
    assert losses[8] < losses[0] - 0.5
    assert json.loads((folder / "final" / "config.json").read_text())["model_type"] == "mamba"


@pytest.mark.parametrize("method", ["relora", "full"])
def test_a_model_whose_evaluation_writes_its_weights_never_trains(method: str, settings: Callable[..., Config]) -> None:
    config = settings("rwkv", training__method=method)
    with pytest.raises(UserError) as error:
        preflight(config)
    [line] = error.value.problems
    assert line.startswith("model: the model writes ") and "rwkv.blocks.0.attention.output.weight" in line
    assert not Path(config.output_dir).exists()
    still = config.model.model_copy(update={"config": {**MODELS["rwkv"], "rescale_every": 0}})  # as the line advises
    assert usage_of(config.model_copy(update={"model": still})).written == ()


def test_a_layer_that_is_bypassed_is_refused_by_name(settings: Callable[..., Config]) -> None:
    config = settings("mamba", lora__target_modules=["in_proj", "dt_proj"])
    _, problems = check_model(config, load_hf_config(config.model, CausalLM()), CausalLM())
    [line] = problems
    assert line.startswith("lora.target_modules: backbone.layers.0.mixer.dt_proj is bypassed: MambaMixer computes")


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize(
    ("name", "still"),
    [("roformer", "embed_positions.weight"), ("ernie4_5_moe", "e_score_correction_bias"), ("bart", "encoder_attn")],
)
def test_all_that_trains_gets_a_gradient_and_is_meant_to(
    name: str, still: str, low_rank: bool, settings: Callable[..., Config]
) -> None:
    """DDP stops at a trained parameter without a gradient."""
    config = settings(name) if low_rank else settings(name, training__method="full")
    usage = usage_of(config)
    trained = trained_by(config, usage, low_rank=low_rank)
    assert trained and not any(still in parameter for parameter in trained)
    assert any(still in parameter for parameter in (usage.idle | usage.frozen))
    if low_rank:
        layers = {parameter.removesuffix(".lora_A") for parameter in trained if parameter.endswith(".lora_A")}
        assert layers and not layers & CROSS


def test_parameters_without_a_gradient_are_reported_before_the_run(settings: Callable[..., Config]) -> None:
    [line] = usage_of(settings("bart")).lines()
    assert line.startswith("20 parameters get no gradient from the loss and do not train: model.decoder.layers.0.enc")


def test_a_model_that_cannot_be_tried_is_judged_by_its_source(settings: Callable[..., Config]) -> None:
    config = settings("mamba")
    hf_config = load_hf_config(config.model, CausalLM())

    class Strange(CausalLM):
        """Its inputs are none that the model takes."""

        def inputs(self, batch: Any) -> Any:
            return {"pixels": batch["input_ids"]}

    usage = probe(config, hf_config, Strange())
    assert "You must specify exactly one of input_ids" in (usage.not_run or "") or "TypeError" in (usage.not_run or "")
    assert {name.rsplit(".", 1)[-1] for name in usage.unfit} == {"x_proj", "dt_proj", "out_proj"}
    [line] = usage.lines()
    assert line.startswith("the model could not be tried before the run (")


def test_a_resumed_stage_wraps_what_its_checkpoint_wraps(settings: Callable[..., Config]) -> None:
    config = settings("llama", lora__target_modules="all-linear")
    hf_config = load_hf_config(config.model, CausalLM())
    model = empty_model(config.model, hf_config, CausalLM())
    names = {"model.layers.0.mlp.up_proj.lora_A", "model.layers.0.mlp.up_proj.lora_B", "model.norm.weight"}
    usage = ModelUsage(unfit=usage_of_wrapped(model, wrapped_names(names)))
    make_trainable(model, Stage("low_rank", 1), config, usage)
    assert set(lora_layers(model)) == {"model.layers.0.mlp.up_proj"}
