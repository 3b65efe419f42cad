"""The configs, the model shapes and the launch files that come with the repository."""

import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig, AutoModelForCausalLM

from relora.config.derived import schedule_of
from relora.config.load import load_config
from relora.config.schema import Config
from relora.method.schedule import Schedule
from tests.helpers.programs import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))
LAUNCH_CONFIGS = sorted(path for path in (ROOT / "launch").glob("*.yaml") if not path.stem.startswith("kubernetes"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]

# size: updates, updates of warm start, rate of the low-rank stage, samples per update, tokens per sample, share of C4
RECIPES = {
    "60m": (20000, 5000, 2e-3, 480, 256, "train[:2%]"),
    "130m": (20000, 5000, 2e-3, 600, 256, "train[:3%]"),
    "250m": (20000, 5000, 1e-3, 1152, 512, "train[:8%]"),
    "350m": (20000, 5000, 1e-3, 1152, 512, "train[:8%]"),
    "1b": (30000, 10000, 8e-4, 1536, 512, "train[:16%]"),
}

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


def read_tree(path: Path) -> dict[str, Any]:
    """The file as any YAML reader has it, laid over the file that it extends."""
    tree = yaml.safe_load(path.read_text())
    return merged(read_tree(path.parent / tree.pop("extends")), tree) if "extends" in tree else tree


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; of anything else, lists included, `above` wins."""
    both = {key: merged(below[key], above[key]) for key in below.keys() & above if isinstance(above[key], dict)}
    return below | above | both


def first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def differences(a: Any, b: Any, prefix: str = "") -> set[str]:
    """The dotted names of the leaves in which two nested mappings differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return set() if a == b else {prefix.rstrip(".")}
    keys = a.keys() | b.keys()
    return set().union(*(differences(a.get(key), b.get(key), f"{prefix}{key}.") for key in keys))


def variant(path: Path, name: str) -> list[str]:
    """The overrides that the first comment gives for a variant."""
    [overrides] = re.findall(rf"^# {name}: (.+)$", first_comment(path), re.MULTILINE)
    return str(overrides).split()


def test_all_configs_are_here() -> None:
    llamas = {f"llama_{size}" for size in RECIPES}
    assert {path.stem for path in CONFIGS} == llamas | {"quickstart", "continue_pretrained"}
    assert {path.stem for path in MODELS} == {f"llama_{size}" for size in SHAPES}


@by_name(CONFIGS)
def test_config_is_valid_and_the_same_to_any_yaml_reader(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"runs/{path.stem}"
    assert config == Config.model_validate(read_tree(path))


@by_name(CONFIGS)
def test_config_starts_with_its_command_hardware_time_and_result(path: Path) -> None:
    comment = first_comment(path)
    assert f"relora train configs/{path.name}" in comment.splitlines()[0]
    for part in ("Hardware:", "Time:", "To expect:"):
        assert part in comment, part


@by_name(CONFIGS)
def test_files_named_in_a_config_exist(path: Path) -> None:
    config = load_config(path)
    assert (config.model.config is None) != (config.model.name_or_path is None)
    if isinstance(config.model.config, str):
        assert (ROOT / config.model.config).is_file()
    for word in re.findall(r"[\w./]+\.(?:yaml|sh|md)\b", first_comment(path)):
        assert (ROOT / word).is_file() or (path.parent / word).is_file(), word


@by_name(CONFIGS)
def test_batch_divides_on_the_hardware_named(path: Path) -> None:
    training = load_config(path).training
    num_processes = 8 if "launch/ddp.yaml" in first_comment(path) else 1
    assert training.global_batch_size % (training.per_device_batch_size * num_processes) == 0


@by_name(CONFIGS)
def test_batch_divides_over_every_number_of_gpus_that_the_header_allows(path: Path) -> None:
    training = load_config(path).training
    for number in re.findall(r"any number of GPUs that divides (\d+)", first_comment(path)):
        assert training.global_batch_size % (training.per_device_batch_size * int(number)) == 0


@pytest.mark.parametrize("size", RECIPES)
def test_recipe(size: str) -> None:
    config = load_config(ROOT / "configs" / f"llama_{size}.yaml")
    steps, warm_start_steps, rate, batch_size, length, split = RECIPES[size]
    assert config.model.config == f"configs/models/llama_{size}.json"
    [source] = config.data.sources
    assert (source.path, source.name, source.split) == ("allenai/c4", "en", split)
    assert (config.data.sequence_length, config.data.tokenizer) == (length, "google-t5/t5-base")
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (128, 32, 0)
    assert config.relora.optimizer_reset == "zero"
    assert (config.optim.adam_beta1, config.optim.adam_beta2, config.optim.weight_decay) == (0.9, 0.999, 0)
    assert (config.training.method, config.training.global_batch_size) == ("relora", batch_size)
    assert schedule_of(config) == Schedule(
        max_steps=steps,
        warmup_steps=500,
        restart_every=5000,
        restart_warmup_steps=100,
        min_lr_ratio=0.1,
        warm_start_steps=warm_start_steps,
        learning_rate=rate,
        warm_start_learning_rate=rate / 2,
    )


@pytest.mark.parametrize("size", RECIPES)
def test_the_papers_own_differs_in_dropout_alone(size: str) -> None:
    path = ROOT / "configs" / f"llama_{size}.yaml"
    ours, papers = (
        load_config(path, overrides).model_dump() for overrides in ([], variant(path, "The paper's own dropout"))
    )
    assert differences(ours, papers) == {"output_dir", "lora.lora_dropout"}
    assert (papers["output_dir"], papers["lora"]["lora_dropout"]) == (f"runs/llama_{size}_paper", 0.1)


@pytest.mark.parametrize("size", RECIPES)
def test_the_baseline_is_one_cosine_at_the_rate_of_the_warm_start(size: str) -> None:
    path = ROOT / "configs" / f"llama_{size}.yaml"
    ours, full = load_config(path), load_config(path, variant(path, "Full-rank baseline"))
    changed = {"output_dir", "training.method", "optim.learning_rate"}
    assert differences(ours.model_dump(), full.model_dump()) == changed
    assert full.output_dir == f"runs/llama_{size}_full"
    schedule = schedule_of(full)
    assert not schedule.has_low_rank_stage
    assert schedule.restarts_done(full.training.max_steps) == 0
    assert schedule.rate(499) == ours.optim.warm_start_learning_rate


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
