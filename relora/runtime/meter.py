"""How long updates take, how much of the devices they use, and what they send."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from relora.config import Config
from relora.method.lora import factor_names
from relora.method.names import named_parameters
from relora.runtime.engines import Engine, Live
from relora.runtime.traffic import Traffic
from relora.runtime.utilisation import flops_per_token, peak_flops

# In the first two updates engines set themselves up: DDP sends its buckets' order, ZeRO-3 traces the modules.
COUNTED_UPDATE = 3


class Meter:
    """Mean speed of updates since it was last asked, evaluation and checkpoints left out; bytes of one update."""

    def __init__(self, engine: Engine, live: Live, config: Config) -> None:
        self._tokens_per_update = config.training.global_batch_size * config.data.sequence_length
        self._most_tokens_per_second = _most_tokens_per_second(engine, live, config)
        self._start_s, self._busy_s, self._updates, self._seen = time.perf_counter(), 0.0, 0, 0
        self._engine, self._live, self._bytes_sent = engine, live, dict[str, float]()

    @contextmanager
    def measured(self, num_micro_batches: int) -> Iterator[None]:
        """Around one update."""
        self._num_micro_batches = num_micro_batches
        self._seen += 1
        if self._seen == COUNTED_UPDATE and self._engine.processes.world_size > 1:
            with Traffic(self._engine.processes.world_size) as traffic:
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


def _most_tokens_per_second(engine: Engine, live: Live, config: Config) -> float | None:
    """What all devices together would train at their peak; None if that is not known."""
    training, processes = config.training, engine.processes
    peak = peak_flops(processes.device, mixed_precision=training.mixed_precision, stated_tflops=training.peak_tflops)
    if peak is None:
        return None
    length = config.data.sequence_length
    return processes.world_size * peak / flops_per_token(live.model, sequence_length=length, shape=engine.store.shape)
