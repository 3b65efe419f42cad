"""The model that step.py, restart.py and checkpoint.py measure, four wide layers unless told otherwise; its update."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from relora import LoRAConfig, build_optimizer, inject_lora
from relora.config.input_sections import ModelSection
from relora.method.choices import BaseDtype
from relora.model.model import build_model, load_hf_config
from relora.model.tasks import CausalLM
from relora.tracking.throughput import flops_per_token, peak_flops

TASK = CausalLM()
MAX_GRAD_NORM = 1.0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Seconds:
    """What an update took: loss, gradients and clipping; the optimizer."""

    gradients: float
    optimizer: float

    @property
    def update(self) -> float:
        return self.gradients + self.optimizer


def add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="a Hugging Face config, instead of the next five")
    model.add_argument("--layers", type=int, default=4)
    model.add_argument("--hidden-size", type=int, default=2048)
    model.add_argument("--intermediate-size", type=int, default=5461)
    model.add_argument("--heads", type=int, default=32)
    model.add_argument("--vocab-size", type=int, default=8192, help="small: the head would hide the layers")
    model.add_argument("--batch", type=int, default=8, help="sequences of an update")
    model.add_argument("--sequence", type=int, default=512, help="tokens of each")
    model.add_argument("--bf16", action="store_true", help="bf16 autocast over fp32 parameters")
    model.add_argument("--peak-tflops", type=float, help="of the device, where it is none of those that relora knows")
    lora = parser.add_argument_group("lora")
    lora.add_argument("--rank", type=int, default=128)
    lora.add_argument("--forward", default="auto", help="auto, merged or factored")
    lora.add_argument("--keep-merged", action=argparse.BooleanOptionalAction, default=True)
    lora.add_argument("--base-dtype", choices=get_args(BaseDtype))
    lora.add_argument(
        "--train-rest", action=argparse.BooleanOptionalAction, default=True, help="embeddings, norms and head in full"
    )
    parser.add_argument("--optimizer", default="adamw", help="name of build_optimizer's")


def model_section(options: argparse.Namespace) -> ModelSection:
    if options.model is not None:
        return ModelSection(config=str(options.model))
    return ModelSection(
        config={
            "model_type": "llama",
            "vocab_size": options.vocab_size,
            "hidden_size": options.hidden_size,
            "intermediate_size": options.intermediate_size,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "max_position_embeddings": options.sequence,
        }
    )


def build(options: argparse.Namespace) -> nn.Module:
    """The plain model, the same at every call; on a GPU drawn there, where billions of numbers take a second."""
    section = model_section(options)
    with device():
        return build_model(section, load_hf_config(section, TASK), TASK, seed=0).train()


def lora_config(options: argparse.Namespace) -> LoRAConfig:
    """As a run from scratch has it: all that is not wrapped trains in full, unless it is to stay frozen."""
    return LoRAConfig(
        r=options.rank,
        modules_to_save="rest" if options.train_rest else (),
        forward=options.forward,
        keep_merged=options.keep_merged,
        base_dtype=options.base_dtype,
    )


def optimizer_for(model: nn.Module, options: argparse.Namespace) -> Optimizer:
    return build_optimizer(model, name=options.optimizer)


def draw_batch(model: nn.Module, options: argparse.Namespace) -> Batch:
    vocab_size = int(model.config.vocab_size)
    ids = torch.randint(vocab_size, (options.batch, options.sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device()), "labels": ids.to(device())}


def mfu(tokens_per_second: float, model: nn.Module, options: argparse.Namespace) -> float | None:
    """The rate as a share of what the device could do at its peak; None where that is not known.

    Args:
        model: with weights of their true shapes.
    """
    precision = "bf16" if options.bf16 else "no"
    peak = peak_flops(device(), mixed_precision=precision, stated_tflops=options.peak_tflops)
    if peak is None:
        return None
    return tokens_per_second * flops_per_token(model, sequence_length=options.sequence) / peak


def shapes_of(options: argparse.Namespace, *, low_rank: bool) -> nn.Module:
    """The model without values: of true shapes, whatever the weights are stored as."""
    section = model_section(options)
    with torch.device("meta"):
        model = build_model(section, load_hf_config(section, TASK), TASK, seed=0)
    if low_rank:
        inject_lora(model, replace(lora_config(options), base_dtype=None))
    return model


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mean_loss(model: nn.Module, batch: Batch, *, bf16: bool) -> Tensor:
    with torch.autocast(device().type, dtype=torch.bfloat16, enabled=bf16):
        return TASK.loss(model, batch) / TASK.num_labels(batch)


def update(model: nn.Module, optimizer: Optimizer, batch: Batch, *, bf16: bool) -> Seconds:
    """Forward, backward, clip, and a step of the optimizer."""
    began = clock_s()
    mean_loss(model, batch, bf16=bf16).backward()
    nn.utils.clip_grad_norm_(trained(optimizer), MAX_GRAD_NORM)
    has_gradients = clock_s()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Seconds(has_gradients - began, clock_s() - has_gradients)


def trained(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clock_s() -> float:
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def counted_saves(model: nn.Module) -> Iterator[dict[Any, int]]:
    """Bytes of each storage that forward passes inside keep for backward, beside the model's own parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[Any, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
