"""The JSON files of an exported model say the same to transformers 4 and 5. Version 4 is not here: its names are."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from relora.checkpoint.export import cast
from relora.checkpoint.portable import FIVE_ALONE, FOUR_AND_FIVE, make_portable
from relora.errors import UserError

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# model_type, its settings, and what transformers 4 must find in config.json (tried with 4.57.3: equal logits).
FAMILIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen2", {"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
    ("llama", {"rope_theta": 3e5, "rope_scaling": YARN}, {"rope_theta": 3e5, "rope_scaling": YARN}),
    ("stablelm", {"rope_theta": 5e4, "partial_rotary_factor": 0.5}, {"rope_theta": 5e4, "partial_rotary_factor": 0.5}),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5e3}, {"rotary_pct": 0.5, "rotary_emb_base": 5e3}),
    ("olmo3", TWO_KINDS | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
    (
        "gemma3_text",
        TWO_KINDS
        | {"head_dim": 16, "rope_theta": 2e6, "rope_local_base_freq": 3e4}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
]


def saved(model_type: str, model_settings: dict[str, Any], folder: Path) -> Any:
    config = AutoConfig.for_model(model_type, **SIZES, **copy.deepcopy(model_settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model_type", "model_settings", "older"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_the_names_of_transformers_4_stand_beside_the_new_ones(
    model_type: str, model_settings: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(model_type, model_settings, tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert make_portable(tmp_path, model) == FOUR_AND_FIVE
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in older} == older
    assert written["torch_dtype"] == written["dtype"] == "float32"
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: after[key] for key in before} == before


def test_a_config_that_transformers_4_has_no_names_for_is_left_alone(tmp_path: Path) -> None:
    theta = {"rope_type": "default", "rope_theta": 1e4}
    two_bases = {"sliding_attention": theta, "full_attention": theta | {"rope_theta": 5e5}}
    model = saved("olmo3", TWO_KINDS | {"rope_parameters": two_bases}, tmp_path)
    before = (tmp_path / "config.json").read_text()
    assert make_portable(tmp_path, model) == FIVE_ALONE
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(before)
    # Version 5 writes an infinite number as a mapping, of which version 4 makes no number.
    CONFIG_MAPPING["mamba2"]().save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    model.config = CONFIG_MAPPING["mamba2"]()
    assert make_portable(tmp_path, model) == FIVE_ALONE


def test_the_tokenizer_is_of_a_class_that_transformers_4_knows(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"fox": 0, "the": 1, "<end>": 2}, unk_token="the")),
        eos_token="<end>",
    ).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    model = saved("llama", {}, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    make_portable(tmp_path, model)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    # Version 4 takes extra_special_tokens for a mapping, and cannot open the tokenizer.
    assert written["additional_special_tokens"] == ["<|im_end|>"]
    assert {"extra_special_tokens", "is_local", "local_files_only"}.isdisjoint(written)
    again, text = AutoTokenizer.from_pretrained(tmp_path), "the fox<|im_end|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_a_weight_that_the_dtype_cannot_hold_is_an_error() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data[1, 2] = 1e5
    with pytest.raises(UserError, match=r"--dtype float16: weight holds 1e\+05, the largest float16 is 6.55e\+04"):
        cast(layer, torch.float16)
    assert layer.weight.dtype == torch.float32
    cast(layer, torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
