"""How long updates take, how much of the devices they use, and how many bytes they send."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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


# By torch.cuda.get_device_name, from NVIDIA's data sheets and architecture papers; half of their figures for sparse.
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
    """Peak FLOP/s of one device: as stated, else by the name of the GPU; None if that is not known."""
    if stated_tflops is not None:
        return stated_tflops * TERA
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    return TERA * (peak.bf16 if mixed_precision == "bf16" else peak.fp32)


def flops_per_token(
    model: nn.Module, *, sequence_length: int, shape: Callable[[nn.Parameter], torch.Size] = lambda p: p.shape
) -> float:
    """FLOPs of an update per token of its batch, as the training method needs them:

        4 N_frozen + 6 N_trained + 12 layers heads head_dim T

    N counts the entries of the matrices that a token is multiplied with: no vectors, no embedding tables unless they
    are the output head too, and of experts those that a token is routed to. A frozen weight W takes 2 N for y = x W^T
    and 2 N for the gradient of x; a trained one, the factors A and B among them, 2 N more for its own. The last term
    is the attention of every token to a whole sequence, as in arXiv 2204.02311, appendix B. Recomputation to save
    memory does not count, and neither does the route of a wrapped layer.

    Args:
        model: of transformers.
        shape: the full shape of a parameter, where an engine leaves the model only a shard of it.
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
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return flops  # a model without attention
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return flops + 12.0 * sequence_length * int(config.num_hidden_layers * heads * head_dim)


class Meter:
    """Speed of the updates since the last logged one, peak memory, and the bytes that an update sends.

    The clock runs from `fields` to `fields`, but for `pause`: reading the next batch counts, evaluation does not.

        for batches in ...:
            with meter.measure(len(batches)):
                engine.update(...)
            if logs:
                line = {..., **meter.fields()}   # after the loss has been read: the device is done then
            if is_due:
                with meter.pause():
                    callbacks(...)
    """

    def __init__(self, engine: Engine, state: TrainState, config: Config) -> None:
        self._engine, self._state = engine, state
        self._tokens_per_update = config.training.global_batch_size * config.data.sequence_length
        self._peak_tokens_per_second = _peak_tokens_per_second(engine, state, config)
        self._start_s, self._num_updates, self._num_seen = time.perf_counter(), 0, 0
        self._bytes_sent: dict[str, float] = {}

    @contextmanager
    def measure(self, num_micro_batches: int) -> Iterator[None]:
        """Around one update of `num_micro_batches` on this process. One is counted, `Engine.counted_update`."""
        self._num_updates += 1
        self._num_seen += 1
        num_processes = self._engine.world.num_processes
        counts = self._num_seen == self._engine.counted_update and num_processes > 1
        with Traffic(num_processes) if counts else nullcontext() as traffic:
            yield
        if traffic is not None and math.isfinite(traffic.bytes_sent):
            self._bytes_sent = {
                "bytes_sent": traffic.bytes_sent,
                "bytes_sent_full_rank": traffic.bytes_sent + self._saved_bytes(num_micro_batches),
            }

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop the clock. Waits for the device first, which may still compute updates: not for every step."""
        device = self._engine.world.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        paused_s = time.perf_counter()
        try:
            yield
        finally:
            self._start_s += time.perf_counter() - paused_s

    def fields(self) -> dict[str, float]:
        """The fields of a line of metrics, on the updates since the last call (at least one).

        Returns:
            tokens_per_second and step_seconds, of all processes together; mfu where the peak of a device is known;
            peak_memory_bytes of this process; and once they are counted, bytes_sent by this process in an update and
            bytes_sent_full_rank, the same for full-rank training. Every update of a stage sends the same.
        """
        now_s = time.perf_counter()
        step_seconds = (now_s - self._start_s) / self._num_updates
        self._start_s, self._num_updates = now_s, 0
        fields = {"tokens_per_second": self._tokens_per_update / step_seconds, "step_seconds": step_seconds}
        if self._peak_tokens_per_second is not None:
            fields["mfu"] = fields["tokens_per_second"] / self._peak_tokens_per_second
        device = self._engine.world.device
        if device.type == "cuda":
            fields["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        else:  # the largest resident size of this process, which Linux counts in KiB and macOS in bytes
            unit = 1 if sys.platform == "darwin" else 1024
            fields["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return fields | self._bytes_sent

    def _saved_bytes(self, num_micro_batches: int) -> float:
        """Bytes by which full-rank training would send more: the gradients of all weights, and of no factors."""
        engine, factors = self._engine, factor_names(self._state.model)
        num_missing = 0
        for name, parameter in named_parameters(self._state.model).items():
            is_sent = parameter.requires_grad and engine.reduces_gradients
            num_missing += engine.store.shape(parameter).numel() * ((name not in factors) - is_sent)
        return 4 * num_missing * engine.sent_per_gradient_byte(num_micro_batches)


def _peak_tokens_per_second(engine: Engine, state: TrainState, config: Config) -> float | None:
    """The rate of training if all devices together ran at their peak; None if that is not known."""
    training, world, length = config.training, engine.world, config.data.sequence_length
    peak = peak_flops(world.device, mixed_precision=training.mixed_precision, stated_tflops=training.peak_tflops)
    if peak is None:
        return None
    per_token = flops_per_token(state.model, sequence_length=length, shape=engine.store.shape)
    return world.num_processes * peak / per_token
