"""What is due when the clock arrives at a step: restart -> evaluation -> checkpoint, in this order.

A restart comes before the checkpoint of its step, so it is never replayed.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from relora.checkpoint.master_weights import exact_weights
from relora.checkpoint.save import Checkpoints
from relora.checkpoint.state import Clock, State
from relora.config import Config
from relora.data import PreparedData, eval_batches, probe_batch
from relora.engines import Engine, TrainState
from relora.method.lora import factor_names, lora_delta, lora_layers
from relora.method.names import named_parameters
from relora.method.schedule import Schedule
from relora.model.generate import sample_text
from relora.tracking.communication import Traffic
from relora.tracking.tracker import Tracker
from relora.train.evaluate import held_out_loss, perplexity
from relora.train.stages import Stage

NUM_PICTURED_LAYERS = 4
NUM_PROBE_ROWS = 8
NUM_PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 2, 16, 48


@dataclass(frozen=True)
class Callbacks:
    """The housekeeping of one stage.

    Attributes:
        stage_start: on rank 0 the wrapped weights at the beginning of the low-rank stage; elsewhere empty.
        about: what every checkpoint says of its run.
    """

    config: Config
    schedule: Schedule
    stage: Stage
    engine: Engine
    live: TrainState
    tracker: Tracker
    data: PreparedData
    checkpoints: Checkpoints
    stage_start: Mapping[str, Tensor]
    about: Mapping[str, Any]

    def __call__(self, clock: Clock) -> None:
        step = clock.step
        self._restart_or_probe(step)
        if self._evaluation_due(step):
            self._evaluate(step)
        if self._save_due(step):
            self._save(clock)

    def is_due(self, step: int) -> bool:
        """Whether there is anything to be done at this step."""
        due = (self._restart_due, self._probe_due, self._evaluation_due, self._save_due)
        return any(is_due(step) for is_due in due)

    def stop(self, clock: Clock, seconds_left: float) -> bool:
        """End before the time: a checkpoint, if there is time for one. An evaluation waits for the resume.

        Returns:
            Whether the checkpoint of this step is on the disk.
        """
        [num_late] = self.engine.world.sum([float(seconds_left < self.checkpoints.expected_seconds())])
        if num_late:
            return False
        self._restart_or_probe(clock.step)
        self._save(clock, evaluated=not self._evaluation_due(clock.step))
        return True

    def catch_up(self, state: State) -> None:
        """What was due at the step of a checkpoint and not done.

        A run now extended made no restart at its old end, where none was due; one that was stopped left the
        evaluation for later.
        """
        if self.stage.is_low_rank and self.schedule.restarts_done(state.clock.step) > state.cycle:
            self._restart(state.clock.step)
        if not state.evaluated:
            self._evaluate(state.clock.step)

    def _restart_due(self, step: int) -> bool:
        return self.stage.is_low_rank and self.schedule.restart_due(step)

    def _probe_due(self, step: int) -> bool:
        """Among the first updates after a restart."""
        done, every = self.schedule.restarts_done(step), self.schedule.restart_every
        if not done or every is None:
            return False
        return step - self.schedule.warm_start_steps - done * every <= self.config.training.probe_steps

    def _evaluation_due(self, step: int) -> bool:
        ends = (0, self.schedule.warm_start_steps, self.schedule.max_steps)
        return step in ends or step % self.config.training.eval_steps == 0

    def _save_due(self, step: int) -> bool:
        return step > 0 and (step % self.config.training.save_steps == 0 or step == self.schedule.max_steps)

    def _restart_or_probe(self, step: int) -> None:
        if self._restart_due(step):
            self._restart(step)
        elif self._probe_due(step):
            self.tracker.line({"step": step, "probe_loss": self._probe_loss()})

    def _restart(self, step: int) -> None:
        relora, index = self.config.relora, self.schedule.restarts_done(step)
        before, start_s = self._probe_loss(), time.perf_counter()
        with Traffic(self.engine.world.num_processes) as traffic:
            report = self.engine.restart(
                self.live,
                seed=self.config.seed,
                index=index,
                reinit=relora.reinit,
                optimizer_reset=relora.optimizer_reset,
                prune_ratio=relora.prune_ratio,
                carry_residual=relora.carry_residual,
            )
        seconds = time.perf_counter() - start_s
        if not self.engine.world.all_equal(checksum(self.live.model, self.engine)):
            raise RuntimeError(f"after the restart at step {step} the processes hold different weights")
        probes = {"probe_loss_before": before, "probe_loss_after": self._probe_loss()}
        if self.config.lora.base_dtype != "float32":
            with exact_weights(self.live.model, self.engine):
                probes["probe_loss_master"] = self._probe_loss()
        costs = {"restart_seconds": seconds, "bytes_sent": traffic.bytes_sent}
        self.tracker.line({"step": step, "restart": index} | asdict(report) | costs | probes)
        self.tracker.spectra(self._spectra(), step)

    def _evaluate(self, step: int) -> None:
        config = self.config
        batches = eval_batches(
            self.data,
            config.data,
            batch_size=config.training.per_device_eval_batch_size or config.training.per_device_batch_size,
            process_index=self.engine.world.process_index,
            num_processes=self.engine.world.num_processes,
        )
        loss = held_out_loss(self.live, self.engine, batches)
        self.tracker.line({"step": step, "eval_loss": loss, "eval_perplexity": perplexity(loss)})
        self.tracker.say(f"step {step}: held-out loss {loss:.4f} nats, perplexity {perplexity(loss):.2f}")
        self._sample(step)
        if self.stage.is_low_rank and step == self.schedule.max_steps:
            self.tracker.spectra(self._spectra(), step)

    def _sample(self, step: int) -> None:
        tokenizer = self.data.tokenizer()
        ids = probe_batch(self.data, self.config.data, batch_size=NUM_PROMPTS)["input_ids"][:, :PROMPT_TOKENS]
        for number, prompt in enumerate(tokenizer.batch_decode(ids, skip_special_tokens=True)):
            with self.engine.inference(self.live):
                text = sample_text(
                    self.live.model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=number
                )
            self.tracker.text(f"sample/{number}", text, step)

    def _save(self, clock: Clock, *, evaluated: bool = True) -> None:
        self.tracker.sync(clock.step)
        self.checkpoints.save(
            self.live,
            self.engine,
            clock,
            stage=self.stage.name,
            cycle=self.schedule.restarts_done(clock.step),
            about={**self.about, "evaluated": evaluated},
        )

    def _probe_loss(self) -> float:
        """Loss on the first held-out rows, one by one: the same whatever the number of processes and the batch size."""
        rows = eval_batches(self.data, self.config.data, batch_size=1)
        return held_out_loss(self.live, self.engine, islice(rows, NUM_PROBE_ROWS))

    @torch.no_grad()
    def _spectra(self) -> dict[str, Tensor]:
        """Singular values of W - W_start of a few layers, spread over the model; on rank 0, which holds W_start."""
        layers = lora_layers(self.live.model)
        # Evenly spaced from the first to the last: different depths, and different kinds of layers.
        places = torch.linspace(0, len(layers) - 1, min(NUM_PICTURED_LAYERS, len(layers))).round().int().tolist()
        names = [list(layers)[place] for place in places]
        spectra = {}
        for name in names:
            layer, store = layers[name], self.engine.store
            A, B, W = (store.read(parameter) for parameter in (layer.lora_A, layer.lora_B, layer.weight))
            if self.stage_start:
                learned = W + lora_delta(A, B, layer.scale, transposed=layer.transposed).to(W.device)
                learned -= self.stage_start[f"{name}.weight"].to(W.device)
                spectra[name] = torch.linalg.svdvals(learned).cpu()
        return spectra


def checksum(model: nn.Module, engine: Engine) -> str:
    """Sums in float64 of all parameters of which every rank holds a copy of its own: the same on all after a restart.

    A shared parameter has no second copy that could differ, nor have the factors of ranks that train apart.
    """
    alone, sums = factor_names(model) if engine.is_apart else set(), {}
    for name, parameter in named_parameters(model).items():
        shown = next(iter(engine.store.local_copies(parameter).values()))
        if name not in alone and not shown.is_partial:
            sums[name] = shown.values.sum(dtype=torch.float64).item()
    return str(sums)
