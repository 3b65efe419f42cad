"""How long updates take, how much of the devices they use, and what they send."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from relora.config import Config
from relora.engines import Engine, TrainState
from relora.method.lora import factor_names
from relora.method.names import named_parameters
from relora.tracking.communication import Traffic

TERA = 1e12


@dataclass(frozen=True)
class Peak:
    """Dense TFLOP/s of one GPU: matrix units in bf16 with fp32 sums, and plain float32."""

    bf16: float
    fp32: float


# By torch.cuda.get_device_name, from NVIDIA's data sheets and architecture papers; half of what they give for sparse.
_A100, _H100_SXM = Peak(312, 19.5), Peak(989.4, 67)
PEAKS = {
    "NVIDIA A10": Peak(125, 31.2),
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA GeForce RTX 3090": Peak(71, 35.6),
    "NVIDIA GeForce RTX 4090": Peak(165.2, 82.6),
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": Peak(756, 51),
    "NVIDIA H200": _H100_SXM,
    "NVIDIA L4": Peak(121, 30.3),
    "NVIDIA L40S": Peak(362, 91.6),
}


def peak_flops(device: torch.device, *, mixed_precision: str, stated_tflops: float | None) -> float | None:
    """FLOP/s of one device at best: as stated, else by the name of the GPU; None if that is not known."""
    if stated_tflops is not None:
        return stated_tflops * TERA
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    return TERA * (peak.bf16 if mixed_precision == "bf16" else peak.fp32)


def flops_per_token(
    model: nn.Module, *, sequence_length: int, shape: Callable[[nn.Parameter], torch.Size] = lambda p: p.shape
) -> float:
    """FLOPs of an update for each token of its batch, as the training method needs them:

        4 N_frozen + 6 N_trained + 12 layers heads head_dim T

    N counts the entries of what tokens are multiplied with: no vectors, no embedding tables unless they are the output
    head too, of experts those that a token goes to. A frozen weight W takes 2 N for y = x W^T and 2 N for the gradient
    of x; a trained one, the factors A and B among them, 2 N more for its own. The last term is the attention of every
    token to a whole sequence, as in arXiv 2204.02311, appendix B. What is computed again to save memory does not
    count, nor does by which route a wrapped layer computes.

    Args:
        model: of transformers.
        shape: the full shape of a parameter, where an engine leaves the model only a part of it.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables -= {id(getattr(head, "weight", None))}
    experts_per_token = getattr(config, "num_experts_per_tok", None)
    flops = 0.0
    for parameter in model.parameters():
        size = shape(parameter)
        if len(size) > 1 and id(parameter) not in tables:
            used = experts_per_token / size[0] if len(size) == 3 and experts_per_token else 1
            flops += (6 if parameter.requires_grad else 4) * used * size.numel()
    return flops + 12 * sequence_length * _attention_width(config)


def _attention_width(config: Any) -> int:
    """Of all layers and heads together; 0 for a model without attention."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return 0
    return int(config.num_hidden_layers * heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes allocated on the GPU, or on a CPU the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# In the first two updates engines set themselves up: DDP sends its buckets' order, ZeRO-3 traces the modules.
COUNTED_UPDATE = 3


class Meter:
    """Mean speed of updates since it was last asked, evaluation and checkpoints left out; bytes of one update."""

    def __init__(self, engine: Engine, live: TrainState, config: Config) -> None:
        self._tokens_per_update = config.training.global_batch_size * config.data.sequence_length
        self._most_tokens_per_second = _most_tokens_per_second(engine, live, config)
        self._start_s, self._busy_s, self._updates, self._seen = time.perf_counter(), 0.0, 0, 0
        self._engine, self._live, self._bytes_sent = engine, live, dict[str, float]()

    @contextmanager
    def measured(self, num_micro_batches: int) -> Iterator[None]:
        """Around one update."""
        self._num_micro_batches = num_micro_batches
        self._seen += 1
        if self._seen == COUNTED_UPDATE and self._engine.world.num_processes > 1:
            with Traffic(self._engine.world.num_processes) as traffic:
                yield
            if math.isfinite(traffic.bytes_sent):
                self._bytes_sent = self._beside_full_rank(traffic.bytes_sent)
        else:
            yield

    def waited(self, num_updates: int) -> None:
        """The time until now was that of so many updates; of those that have to be made again it is time lost."""
        now_s = time.perf_counter()
        self._busy_s += now_s - self._start_s
        self._start_s, self._updates = now_s, self._updates + num_updates

    def restart_clock(self) -> None:
        self._start_s = time.perf_counter()

    def speed(self) -> dict[str, float]:
        """Fields of metrics; `mfu` is among them where the peak of a device is known."""
        step_seconds = self._busy_s / self._updates
        self._busy_s, self._updates = 0.0, 0
        tokens_per_second = self._tokens_per_update / step_seconds
        most = self._most_tokens_per_second
        mfu = {} if most is None else {"mfu": tokens_per_second / most}
        return {"tokens_per_second": tokens_per_second, "step_seconds": step_seconds, **mfu}

    def bytes_sent(self) -> dict[str, float]:
        """What this rank sends in an update, once it has been counted: every update of a stage sends the same."""
        return self._bytes_sent

    def _beside_full_rank(self, sent: float) -> dict[str, float]:
        """The bytes counted, and those of full-rank training: with the gradients of all weights, and of no factors."""
        factors, missing = factor_names(self._live.model), 0
        for name, parameter in named_parameters(self._live.model).items():
            travels = parameter.requires_grad and not self._engine.is_apart
            missing += self._engine.store.shape(parameter).numel() * ((name not in factors) - travels)
        more = 4 * missing * self._engine.sent_per_gradient_byte(self._num_micro_batches)
        return {"bytes_sent": sent, "bytes_sent_full_rank": sent + more}


def _most_tokens_per_second(engine: Engine, live: TrainState, config: Config) -> float | None:
    """What all devices together would train at their peak; None if that is not known."""
    training, processes = config.training, engine.world
    peak = peak_flops(processes.device, mixed_precision=training.mixed_precision, stated_tflops=training.peak_tflops)
    if peak is None:
        return None
    length = config.data.sequence_length
    return (
        processes.num_processes * peak / flops_per_token(live.model, sequence_length=length, shape=engine.store.shape)
    )
