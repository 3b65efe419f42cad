"""Configs of models that cannot be built: one line, at once, and nothing is built."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from relora.config import ModelSection
from relora.model.model import read_hf_config
from relora.model.tasks import CausalLM
from tests.helpers.tiny import MODEL


def problems_of(config: Any) -> list[str]:
    begin = time.process_time()
    found, problems = read_hf_config(ModelSection(config=config), CausalLM())
    assert time.process_time() - begin < 2
    assert (found is None) == bool(problems)
    return problems


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("llama", "num_hidden_layers"),
        ("gpt2", "n_layer"),
        ("mixtral", "num_local_experts"),
        ("opt", "num_hidden_layers"),
    ],
)
def test_a_model_of_more_layers_than_can_be_built(model_type: str, key: str) -> None:
    [problem] = problems_of({"model_type": model_type, key: 2**31})
    assert problem == f"model.config: {key} = 2147483648: more than 10,000 of them cannot be built"


def test_a_model_of_more_labels_than_can_be_named() -> None:
    [problem] = problems_of(MODEL | {"num_labels": 2**31})
    assert problem == "model.config: num_labels = 2147483648: more than 1,000,000 of them cannot be built"


def test_layers_of_a_part_of_a_model_and_of_a_pretrained_one(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 2**31}
    [problem] = problems_of({"model_type": "gemma3", "text_config": text})
    assert "text_config.num_hidden_layers = 2147483648" in problem
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": 2**31}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    found, [problem] = read_hf_config(ModelSection(name_or_path=str(tmp_path)), CausalLM())
    assert found is None
    assert "num_hidden_layers = 2147483648" in problem


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float99"},
        {"torch_dtype": 5},
        {"quantization_config": "fp8"},
        {"quantization_config": 5},
        {"quantization_config": {"quant_method": "none"}},
        {"auto_map": 1},
        {"rope_parameters": 2**31},
        {"layer_types": [None]},
    ],
    ids=str,
)
def test_values_that_transformers_cannot_use(change: dict[str, Any]) -> None:
    for problem in problems_of(MODEL | change):
        assert problem.startswith("model.config: transformers refuses it for model_type llama: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 5000 + "]" * 5000, "nested too deep"),
        ('{"a": "\\ud800"}', r"'\ud800' is not Unicode text"),
        ('{"a": 1' + "0" * 99 + "}", "an integer of 329 bits; 128 are the most"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        (json.dumps({"a": [1] * 100_001}), "more than 100,000 values, aliases included"),
    ],
    ids=range(5),
)
def test_json_that_is_no_plain_data(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text)
    [problem] = problems_of(str(tmp_path / "model.json"))
    assert problem.startswith(f"model.config = {tmp_path}/model.json: is not a readable JSON file ({reason}")


def test_code_of_a_models_own_is_named_with_its_remedy(tmp_path: Path) -> None:
    config = {"model_type": "none", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise AssertionError('was run')\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    found, problems = read_hf_config(ModelSection(name_or_path=str(tmp_path)), CausalLM())
    assert found is None
    assert problems == [
        f"model.name_or_path = {tmp_path}: it comes with code of its own, which is run only with "
        "model.trust_remote_code = true; read it first"
    ]
