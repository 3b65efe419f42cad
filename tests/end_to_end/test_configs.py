"""The configs, the model shapes and the launch files that come with the repository."""

import itertools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig, AutoModelForCausalLM

from relora.config.load import load_config
from relora.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
LAUNCH_CONFIGS = sorted(path for path in (ROOT / "launch").glob("*.yaml") if path.stem != "kubernetes")
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
SIZES = ["60m", "130m", "250m", "350m", "1b"]

# size: hidden, heads, layers, ffn, parameters with a vocabulary of 32,100 and untied embeddings
SHAPES = {
    "9m": (128, 4, 4, 352, 9_021_568),
    "20m": (256, 4, 4, 688, 19_599_616),
    "35m": (384, 8, 6, 1024, 35_274_624),
    "60m": (512, 8, 8, 1376, 58_176_000),
    "130m": (768, 12, 12, 2048, 134_259_456),
    "250m": (768, 16, 24, 2560, 247_524_096),
    "350m": (1024, 16, 24, 2736, 368_174_080),
    "1b": (2048, 32, 24, 5461, 1_339_492_352),
    "3b": (2560, 32, 32, 6848, 2_686_343_680),
    "7b": (4096, 32, 32, 11008, 6_739_234_816),
}


def by_name(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


def load(path: Path) -> Config:
    """By our own reader, rules between keys included."""
    return load_config(path)


def first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    """The dotted names of the leaves in which two nested mappings differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {prefix.rstrip(".")}
    keys = a.keys() | b.keys()
    return set().union(*(differences(a.get(key), b.get(key), f"{prefix}{key}.") for key in keys))


def test_all_configs_are_here() -> None:
    llamas = {f"llama_{size}{kind}" for size in SIZES for kind in ("", "_paper", "_full")}
    assert {path.stem for path in CONFIGS} >= llamas | {"quickstart", "continue_pretrained"}
    assert {path.stem for path in LAUNCH_CONFIGS} >= {"cpu", "ddp_cpu", "one_gpu", "ddp"}
    assert {path.stem for path in MODELS} == {f"llama_{size}" for size in SHAPES}


@by_name(CONFIGS)
def test_config_is_valid_and_the_same_to_any_yaml_reader(path: Path) -> None:
    config = load(path)
    assert config.output_dir == f"runs/{path.stem}"
    assert config == Config.model_validate(yaml.safe_load(path.read_text()))


@by_name(CONFIGS)
def test_config_starts_with_its_command_hardware_time_and_result(path: Path) -> None:
    comment = first_comment(path)
    assert f"relora train configs/{path.name}" in comment.splitlines()[0]
    for part in ("Hardware:", "Time:", "To expect:"):
        assert part in comment, part


@by_name(CONFIGS)
def test_files_named_in_a_config_exist(path: Path) -> None:
    config = load(path)
    assert (config.model.config is None) != (config.model.name_or_path is None)
    if isinstance(config.model.config, str):
        assert (ROOT / config.model.config).is_file()
    for word in first_comment(path).split():
        if word.startswith(("launch/", "configs/")):
            assert (ROOT / word.strip("(),;:")).is_file(), word


@by_name(CONFIGS)
def test_batch_divides_on_the_hardware_named(path: Path) -> None:
    training = load(path).training
    num_processes = 8 if "launch/ddp.yaml" in first_comment(path) else 1
    assert training.global_batch_size % (training.per_device_batch_size * num_processes) == 0


@pytest.mark.parametrize("size", SIZES)
def test_sizes_differ_only_where_they_say(size: str) -> None:
    paper, plain, full = (
        load(ROOT / "configs" / f"llama_{size}{kind}.yaml").model_dump() for kind in ("_paper", "", "_full")
    )
    assert differences(paper, plain) == {"output_dir", "lora.lora_dropout"}
    assert (paper["lora"]["lora_dropout"], plain["lora"]["lora_dropout"]) == (0.1, 0.0)
    assert {name for name in differences(plain, full) if not name.startswith("relora.")} == {
        "output_dir",
        "training.method",
        "optim.learning_rate",
        "optim.warm_start_learning_rate",
    }
    assert full["optim"]["learning_rate"] == plain["optim"]["warm_start_learning_rate"]


@pytest.mark.parametrize("size", SIZES)
def test_paper_recipe(size: str) -> None:
    config = load(ROOT / "configs" / f"llama_{size}_paper.yaml")
    assert config.model.config == f"configs/models/llama_{size}.json"
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (128, 32, 0.1)
    assert (config.relora.restart_every, config.relora.optimizer_reset) == (5000, "zero")
    steps = (config.relora.warm_start_steps, config.training.max_steps)
    assert steps == ((10000, 30000) if size == "1b" else (5000, 20000))
    assert (config.schedule.warmup_steps, config.schedule.restart_warmup_steps) == (500, 100)
    assert config.schedule.min_lr_ratio == 0.1
    assert config.optim.warm_start_learning_rate == config.optim.learning_rate / 2


@pytest.mark.parametrize("size", SHAPES)
def test_model_shape(size: str) -> None:
    path = ROOT / "configs" / "models" / f"llama_{size}.json"
    hidden, heads, layers, ffn, num_parameters = SHAPES[size]
    config = AutoConfig.from_pretrained(path)
    shape = (config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.intermediate_size)
    assert shape == (hidden, heads, layers, ffn)
    assert (config.model_type, config.vocab_size, config.tie_word_embeddings) == ("llama", 32100, False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert json.loads(path.read_text()).keys() <= config.to_dict().keys()  # no key that transformers does not know


@by_name(LAUNCH_CONFIGS)
def test_launch_config_is_accelerates_and_names_its_command(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # training.mixed_precision decides
    assert f"accelerate launch --config_file launch/{path.name} -m relora train " in first_comment(path)


@by_name(SCRIPTS)
def test_script_is_executable_bash(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n#")
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_multinode_script_reports_all_that_is_missing_at_once() -> None:
    script = ROOT / "launch" / "torchrun_multinode.sh"
    known = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "RDZV")
    environment = {name: value for name, value in os.environ.items() if name not in known}
    result = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    for name in ("NNODES", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "NODE_RANK", "config"):
        assert name in result.stderr, name
