"""No launch does something else than it says: it is what it asks for, or refused before a model is built."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from transformers import LlamaConfig, LlamaForCausalLM

from relora.config import UserError, check
from relora.engines.fsdp2 import FSDPOptions
from relora.engines.world import launched_engine
from relora.train.preflight import preflight
from tests.helpers.launch import LAUNCHER, RELORA, forked_launch, launch_file, written
from tests.helpers.programs import ROOT, run
from tests.helpers.tiny import MODEL, settings

CPU_OF_MPI = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_processes": 2}
TWO = ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]


def file(name: str, *options: str) -> list[str]:
    return [*launch_file(name), *options]


def as_rank_0_of(launch: list[str], patch: pytest.MonkeyPatch) -> None:
    """Give this process the environment that `accelerate launch` would give to rank 0, without starting it."""
    seen: dict[str, str] = {}

    def torchrun(options: Any) -> None:
        ranks = {"WORLD_SIZE": str(options.nproc_per_node), "RANK": "0", "LOCAL_RANK": "0"}
        seen.update(os.environ | ranks)

    class OneProcess:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:  # noqa: ARG002
            seen.update(env)

        def wait(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as launching:
        launching.setattr(torch.distributed.run, "run", torchrun)
        launching.setattr(subprocess, "Popen", OneProcess)
        launch_command(launch_command_parser().parse_args([*launch, "-m", "relora"]))
    assert seen, "nothing was started"
    for name, value in seen.items():
        patch.setenv(name, value)


def problems(corpus: Path, folder: Path, **overrides: Any) -> list[str]:
    """What `relora train` has against the launch that this process believes to be in."""
    tree = settings(corpus, folder / "run", **{"training__per_device_batch_size": 1} | overrides)
    try:
        preflight(check(tree))
    except UserError as error:
        assert not (folder / "run").exists()
        return error.problems
    return []


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero3"])
def test_factors_have_an_optimizer_of_their_own_only_where_they_are_whole(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank_0_of(file(f"{name}_cpu"), monkeypatch)
    refused = ["optim.factors = product: needs one process or DDP, in which every factor is whole"]
    assert problems(corpus, tmp_path, optim={"factors": "product"}) == (refused if name != "ddp" else [])
    # Method full has no factors.
    assert problems(corpus, tmp_path, optim={"factors": "product"}, training__method="full") == []
    refused = ["optim.name = muon: needs one process or DDP, in which every matrix is whole"]
    assert problems(corpus, tmp_path, optim={"name": "muon"}) == (refused if name != "ddp" else [])


@pytest.mark.parametrize("path", sorted(Path(ROOT, "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_in_launch_are_not_refused(
    path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.stem.startswith("kubernetes"):
        return  # not accelerate's
    as_rank_0_of(file(path.stem), monkeypatch)
    kinds = {"fsdp": "fsdp2", "zero": "deepspeed"}
    assert launched_engine() == kinds.get(path.stem[:4], "ddp")
    assert problems(corpus, tmp_path) == []


DEEPSPEED = {
    "stage 0": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0: must be 1, 2 or 3"),
    "fp16": ({"fp16": {"enabled": True}}, "fp16.enabled = true: not supported; set training.mixed_precision instead"),
    "bf16": ({"bf16": {"enabled": True}}, "bf16.enabled = true: not supported; set training.mixed_precision instead"),
    "scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        "scheduler: not supported",
    ),
    "optimizer": ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer.type = Lamb: must be AdamW"),
    "rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        "optimizer.params.lr: set it in",
    ),
    "clipping": ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5: conflicts with optim.max_grad_norm = 1.0"),
    "batch": ({"train_batch_size": 32}, "train_batch_size = 32: conflicts with training.global_batch_size = 8"),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 4},
        "train_micro_batch_size_per_gpu = 4: conflicts with training.per_device_batch_size = 1",
    ),
    "accumulation": ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps = 3: the batch sizes imply 4"),
    "nvme": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}},
        "zero_optimization.offload_optimizer.device = nvme: must be none or cpu",
    ),
    "parameters on nvme": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}},
        "zero_optimization.offload_param.device = nvme: must be none or cpu",
    ),
    "quantized": (
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
        "zero_optimization.zero_quantized_weights: not supported",
    ),
}


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_options_that_would_change_the_run_are_refused(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = DEEPSPEED[name]
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | options))
    as_rank_0_of(["--use_deepspeed", "--deepspeed_config_file", str(path), *TWO], monkeypatch)
    [problem] = problems(corpus, tmp_path)
    assert problem.startswith(f"DeepSpeed: {message}")


def test_deepspeed_options_that_only_say_how_are_taken(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    auto = {"train_batch_size": "auto", "gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": {}}}
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000} | offload} | auto))
    as_rank_0_of(["--use_deepspeed", "--deepspeed_config_file", str(path), *TWO], monkeypatch)
    assert problems(corpus, tmp_path) == []


REFUSED = {
    "FSDP 1": (file("fsdp2_cpu", "--fsdp_version", "1"), "FSDP: fsdp_version 1 cannot hold"),
    "activations on the host": (
        file("fsdp2_cpu", "--fsdp_activation_checkpointing_offload", "true"),
        "FSDP: fsdp_activation_checkpointing_offload:",
    ),
    "Megatron": (["--use_megatron_lm", *TWO], "the launcher asks for Megatron-LM"),
    "tensor parallelism": (
        ["--use_fsdp", "--fsdp_version", "2", "--use_parallelism_config", "--parallelism_config_tp_size", "2", *TWO],
        "the launcher asks for tensor parallelism",
    ),
    "ZeRO 0": (file("zero1_cpu", "--zero_stage", "0"), "DeepSpeed: zero_optimization.stage = 0"),
    "clipping": (file("zero2_cpu", "--gradient_clipping", "0.5"), "DeepSpeed: gradient_clipping = 0.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_engine_does_is_refused(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, message = REFUSED[name]
    as_rank_0_of(launch, monkeypatch)
    [problem] = problems(corpus, tmp_path)
    assert problem.startswith(message)


def test_deepspeed_that_is_not_installed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank_0_of(file("zero2_cpu"), monkeypatch)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    [problem] = problems(corpus, tmp_path)
    assert problem.endswith("which is not installed: pip install 'relora[deepspeed]'")


def multi_cpu(folder: Path) -> list[str]:
    """The accelerate file that looks like two processes on the CPU."""
    path = folder / "multi_cpu.yaml"
    path.write_text(yaml.safe_dump(CPU_OF_MPI | {"use_cpu": True, "num_machines": 1, "machine_rank": 0}))
    return ["--config_file", str(path)]


def dry_run(launcher: list[str], config: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The launch itself, up to the first forward pass."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    return run(["env", *variables, *launcher, "-m", "relora", "train", str(config), "--dry-run", *overrides])


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    return written(settings(corpus, tmp_path / "run", training__per_device_batch_size=2), tmp_path)


# accelerate starts one process for both, without a word: neither leaves a trace of the second.


def test_two_processes_that_are_one_say_so(config: Path) -> None:
    result = dry_run([*LAUNCHER, "--cpu", "--num_processes", "2"], config)
    assert "engine one process, processes 1, device cpu" in result.stdout.splitlines()[0]
    assert result.returncode == 0


def test_two_processes_that_are_one_are_refused_where_the_number_is_asked_for(config: Path, tmp_path: Path) -> None:
    result = dry_run([*LAUNCHER, *multi_cpu(tmp_path)], config, "training.num_processes=2")
    assert result.returncode != 0
    assert "training.num_processes = 2: the launcher started 1" in result.stderr
    assert "relora 0" not in result.stdout


def test_the_option_that_does_not_exist_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(["--use_cpu", "-m", "relora"])
    assert "--use_cpu" in capsys.readouterr().err


# Under accelerate itself some of these would be two models that know nothing of each other, or DDP in place of FSDP2
# and ZeRO: where it is `told`, a variable of its own says that the launch is of CPUs. relora sees that for itself.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TOLD = {"ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [(TORCHRUN, "DDP (gloo)"), ([*LAUNCHER, *file("zero3_cpu")], "DeepSpeed ZeRO-3 (gloo)")],
    ids=["torchrun, told", "zero3, told"],
)
def test_two_processes_on_the_cpu_are_what_they_are_called(launcher: list[str], engine: str, config: Path) -> None:
    assert_engine_of_two(dry_run(launcher, config, **TOLD), engine)


@pytest.mark.parametrize(
    ("options", "environment", "engine"),
    [
        (["--multi_gpu", *TWO], {}, "DDP (gloo)"),
        (file("ddp_cpu"), TOLD, "DDP (gloo)"),
        (file("fsdp2_cpu"), TOLD, "FSDP2 (gloo)"),
    ],
    ids=["options", "file, told", "fsdp2, told"],
)
def test_two_forks_on_the_cpu_are_what_they_are_called(
    options: list[str], environment: dict[str, str], engine: str, config: Path
) -> None:
    result = forked_launch(options, RELORA, "train", str(config), "--dry-run", **environment)
    assert_engine_of_two(result, engine)


def assert_engine_of_two(result: subprocess.CompletedProcess[str], engine: str) -> None:
    assert f"engine {engine}, processes 2, device cpu" in result.stdout, result.stderr[-3000:]
    assert result.returncode == 0
    # Of 21 tensors, whole: ZeRO-3 leaves the model none of its own.
    assert "trained in full                               21 tensors         36,768 parameters" in result.stdout


FSDP = ["--use_fsdp", "--fsdp_version", "2", *TWO]


def llama(num_layers: int, **changes: Any) -> LlamaForCausalLM:
    with torch.device("meta"):
        shape = {key: value for key, value in MODEL.items() if key not in ("model_type", "num_hidden_layers")}
        return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=num_layers, **changes))


@pytest.mark.parametrize(
    ("options", "units"),
    [
        (file("fsdp2_cpu"), ["LlamaDecoderLayer"] * 3),
        (file("fsdp2_cpu", "--fsdp_transformer_layer_cls_to_wrap", "LlamaMLP"), ["LlamaMLP"] * 3),
        ([*FSDP, "--fsdp_auto_wrap_policy", "NO_WRAP"], []),
        (
            [*FSDP, "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", "--fsdp_min_num_params", "4000"],
            ["Embedding", *["LlamaAttention", "LlamaMLP"] * 3, "Linear"],
        ),
    ],
    ids=["blocks", "named", "none", "size"],
)
def test_fsdp_units_are_those_that_the_launcher_asks_for(
    options: list[str], units: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank_0_of(options, monkeypatch)
    found = FSDPOptions.launched().units(llama(num_layers=3))
    assert sorted(type(unit).__name__ for unit in found) == sorted(units)


def test_tied_embeddings_are_in_the_outermost_unit_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = llama(num_layers=2, tie_word_embeddings=True)
    as_rank_0_of([*FSDP, "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", "--fsdp_min_num_params", "4000"], monkeypatch)
    units = [type(unit).__name__ for unit in FSDPOptions.launched().units(tied)]
    assert sorted(units) == ["LlamaAttention", "LlamaAttention", "LlamaMLP", "LlamaMLP"]
    monkeypatch.undo()
    named = file("fsdp2_cpu", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer,Embedding")
    as_rank_0_of(named, monkeypatch)
    with pytest.raises(ValueError, match="FSDP: Embedding of LlamaForCausalLM shares a parameter with"):
        FSDPOptions.launched().units(tied)


def test_fsdp_names_the_blocks_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank_0_of(file("fsdp2_cpu", "--fsdp_transformer_layer_cls_to_wrap", "GPT2Block"), monkeypatch)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no module of class GPT2Block"):
        FSDPOptions.launched().units(llama(num_layers=1))


def test_fsdp_options_are_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = "reshard_after_forward", "offload_params", "activation_checkpointing"
    for value in ("true", "false"):
        as_rank_0_of(file("fsdp2_cpu", *(word for name in chosen for word in (f"--fsdp_{name}", value))), monkeypatch)
        options = FSDPOptions.launched()
        found = options.reshard_after_forward, options.cpu_offload, options.activation_checkpointing
        assert set(found) == {value == "true"}
