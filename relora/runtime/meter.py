"""How long updates take, and what they send."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from relora.runtime.engines import Engine, Live
from relora.runtime.traffic import Traffic

# In the first two updates engines set themselves up: DDP sends its buckets' order, ZeRO-3 traces the modules.
COUNTED_UPDATE = 3


class Meter:
    """Mean seconds per update since it was last asked, evaluation and checkpoints left out; bytes of one update."""

    def __init__(self, engine: Engine, live: Live) -> None:
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
        now_s = time.perf_counter()
        self._busy_s += now_s - self._start_s
        self._start_s, self._updates = now_s, self._updates + 1

    def restart_clock(self) -> None:
        self._start_s = time.perf_counter()

    def seconds_per_update(self) -> float:
        mean_s = self._busy_s / self._updates
        self._busy_s, self._updates = 0.0, 0
        return mean_s

    def bytes_sent(self) -> dict[str, float]:
        """What this rank sends in an update, once it has been counted: every update of a stage sends the same."""
        return self._bytes_sent

    def _beside_full_rank(self, sent: float) -> dict[str, float]:
        """The bytes counted, and those with the gradients of all parameters in place of the trained ones'."""
        parameters, shape = self._live.model.parameters(), self._engine.store.shape
        kept = [p for p in parameters if self._engine.is_apart or not p.requires_grad]
        num_bytes = sum(shape(p).numel() * 4 for p in kept)
        more = num_bytes * self._engine.sent_per_gradient_byte(self._num_micro_batches)
        return {"bytes_sent": sent, "bytes_sent_full_rank": sent + more}
