"""Whole runs on the device: those of the host, resumed to the bit, under every engine, with each option for GPUs."""

import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from relora.config import check
from relora.engines.world import World
from relora.train.train import train
from tests.helpers.fresh_process import in_a_fresh_process
from tests.helpers.tiny import MODEL, metrics, only, settings, stopped

pytestmark = pytest.mark.gpu
HAS_GPU = torch.cuda.is_available()
# Flash attention asks for heads of at least 32 numbers, bitsandbytes for state of at least 4096 entries.
RUN: dict[str, Any] = {
    "model": {"config": MODEL | {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1}},
    "lora": {"r": 32, "lora_alpha": 32},
    "optim": {"learning_rate": 3e-3},
    "training__report_to": [],
    "training__eval_steps": 12,
}
RESUME_STEP, END = 8, 12
BF16 = {"training__mixed_precision": "bf16"}
LEARNED = 0.3  # nats that the tiny run learns at least


@dataclass(frozen=True)
class Option:
    """A setting whose run must come to what the plain one comes to.

    Attributes:
        off: nats by which its held-out loss may differ, for the rounding of what it changes.
        needs: packages beside relora's own.
        gpu_only: a CPU has no such kernel, or its own tests elsewhere.
    """

    overrides: dict[str, Any]
    off: float
    needs: tuple[str, ...] = field(default=())
    gpu_only: bool = False


OPTIONS = {
    "bf16": Option(BF16, 0.03),
    "gradient checkpointing": Option({"model__gradient_checkpointing": True}, 1e-4),
    "8-bit AdamW": Option({"optim__name": "adamw_8bit"}, 0.03, ("bitsandbytes",)),
    "base bfloat16": Option({"lora__base_dtype": "bfloat16"}, 0.03),
    "base int8": Option({"lora__base_dtype": "int8"}, 0.05, ("bitsandbytes",)),
    "base nf4": Option({"lora__base_dtype": "nf4"}, 0.2, ("bitsandbytes",)),
    "compiled": Option({"model__torch_compile": True}, 1e-3, gpu_only=True),
    "compiled, bf16": Option({"model__torch_compile": True} | BF16, 0.03, gpu_only=True),
    "Triton": Option({"lora__kernels": "triton"}, 1e-3, ("triton",), gpu_only=True),
    "Triton, factored, bf16": Option(
        {"lora__kernels": "triton", "lora__forward": "factored"} | BF16, 0.03, ("triton",), gpu_only=True
    ),
    "liger": Option({"model__liger_kernel": True}, 1e-3, ("liger_kernel",), gpu_only=True),
    "flash attention": Option(
        {"model__attn_implementation": "flash_attention_2"} | BF16, 0.03, ("flash_attn",), gpu_only=True
    ),
}
Lines = list[dict[str, Any]]


def tree_of(corpus: Path, folder: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    return settings(corpus, folder, **copy.deepcopy(RUN), **overrides)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The settings of the finished run with an option; made when it is first asked for. "plain" has none."""

    @cache
    def made(name: str) -> dict[str, Any]:
        overrides = {} if name == "plain" else OPTIONS[name].overrides
        tree = tree_of(corpus, tmp_path_factory.mktemp("runs") / "run", overrides)
        train(check(tree))
        return tree

    return made


def end_loss(lines: Lines) -> float:
    return float(only(lines, "eval_loss")[END])


def on_host(tree: dict[str, Any]) -> Lines:
    """Train without a GPU. For a process of its own."""
    torch.cuda.is_available = lambda: False
    train(check(tree))
    return metrics(tree["output_dir"])


def test_a_run_is_that_of_the_host(run: Callable[[str], dict[str, Any]], corpus: Path, tmp_path: Path) -> None:
    lines = metrics(run("plain")["output_dir"])
    expected = in_a_fresh_process(on_host, tree_of(corpus, tmp_path / "host", {}))
    assert [(line["step"], line.keys()) for line in lines] == [(line["step"], line.keys()) for line in expected]
    for name in ("loss", "eval_loss", "probe_loss_before", "probe_loss_after"):
        assert only(lines, name) == pytest.approx(only(expected, name), abs=1e-3), name
    losses = only(lines, "eval_loss")
    assert only(lines, "loss")[1] - losses[END] > LEARNED
    assert max(only(lines, "merge_error").values()) < 1e-6


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_the_same_model(run: Callable[[str], dict[str, Any]], name: str) -> None:
    option = OPTIONS[name]
    missing = [package for package in option.needs if importlib.util.find_spec(package) is None]
    if missing or (option.gpu_only and not HAS_GPU):
        pytest.skip(f"needs {', '.join(missing) or 'a GPU'}")
    lines, plain = (metrics(run(which)["output_dir"]) for which in (name, "plain"))
    assert end_loss(lines) == pytest.approx(end_loss(plain), abs=option.off)
    assert len(only(lines, "restart")) == len(only(plain, "restart")) == 2


# The backward pass of fused attention adds in whatever order its blocks are done: the last bits differ from run to run.
@pytest.mark.parametrize(("attention", "off"), [("eager", 0.0), ("sdpa", 1e-4 if HAS_GPU else 0.0)])
def test_a_resumed_run_is_the_same(corpus: Path, tmp_path: Path, attention: str, off: float) -> None:
    tree = tree_of(corpus, tmp_path / "run", {"model__attn_implementation": attention})
    train(check(tree))
    copy = stopped(tree, RESUME_STEP, tmp_path / "resumed")
    train(check(copy))
    expected, found = metrics(tree["output_dir"]), metrics(copy["output_dir"])
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for name in ("loss", "eval_loss", "grad_norm", "probe_loss_after", "update_effective_rank"):
        assert only(found, name) == pytest.approx(only(expected, name), abs=off, rel=off), name


def launched(engine: str, tree: dict[str, Any]) -> tuple[str, Lines]:
    """Train as the only process of a launch: the backend, and the metrics. For a process of its own."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if engine == "ddp":
        tree["training"]["engine"] = "tests.helpers.rehearsal:ddp"
    elif engine == "fsdp2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
    else:
        stage = engine.removeprefix("zero")
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
    backends = []
    barrier = World.barrier
    World.barrier = lambda world: (backends.append(world.backend), barrier(world))[1]  # type: ignore[method-assign,func-returns-value]
    train(check(tree))
    PartialState().destroy_process_group()
    return backends[-1], metrics(tree["output_dir"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero3"])
def test_an_engine_at_world_size_one_trains_the_same_model(
    run: Callable[[str], dict[str, Any]], corpus: Path, tmp_path: Path, engine: str
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    backend, lines = in_a_fresh_process(launched, engine, tree_of(corpus, tmp_path / engine, {}))
    assert backend == ("nccl" if HAS_GPU else "gloo")
    assert end_loss(lines) == pytest.approx(end_loss(metrics(run("plain")["output_dir"])), abs=1e-3)
    assert len(only(lines, "restart")) == 2
