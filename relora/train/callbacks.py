"""Callbacks of a stage: restart or probe -> evaluation -> checkpoint, each where it is due, in this order.

A restart comes before the checkpoint of its step, so it is never replayed.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice

import torch
from torch import Tensor

from relora.checkpoint.format import History
from relora.checkpoint.master_weights import exact_weights
from relora.checkpoint.save import Checkpoints
from relora.checkpoint.state import State
from relora.config.derived import reinit_policy
from relora.data import eval_batches
from relora.engines import Engine, TrainState
from relora.errors import UserError, warn
from relora.method.delta import lora_delta
from relora.method.lora import lora_layers
from relora.model.generate import sample_text
from relora.tracking.communication import Traffic
from relora.tracking.metrics_file import metrics_facts
from relora.tracking.tracker import Tracker
from relora.train.evaluate import GivenUp, held_out_loss
from relora.train.run import Run, write_settings
from relora.train.signals import StopRequest
from relora.train.stages import Stage

NUM_SPECTRA = 4
NUM_PROBE_ROWS = 8
NUM_PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 2, 16, 48


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of one stage. All processes call them at the same steps.

    Attributes:
        stage_start: the wrapped weights at the beginning of the low-rank stage, on the first process; elsewhere empty.
    """

    run: Run
    stage: Stage
    engine: Engine
    state: TrainState
    tracker: Tracker
    checkpoints: Checkpoints
    stage_start: Mapping[str, Tensor]
    stop_request: StopRequest

    def __call__(self, step: int, history: History, *, stops: bool = False) -> bool:
        """Run what is due at `step`.

        Args:
            history: what the updates so far have told.
            stops: the run stops here, as some process has been asked to.

        Returns:
            Whether the run stops here, as it has been asked to by now. There is a checkpoint of this step then, if
            there was time for one; an evaluation that was given up or not begun is left for the resumed run.
        """
        self.restart_or_probe(step)
        evaluated = not self.evaluation_due(step) or (not stops and self.evaluate(step))
        stops = stops or self.asked_to_stop()
        training = self.run.config.training
        is_due = stops or step % training.save_steps == 0 or step == training.max_steps
        if step > 0 and is_due and not (stops and self.too_late_to_save()):
            self.save(step, history, evaluated=evaluated)
        return stops or self.asked_to_stop()

    def next_due(self, step: int) -> int:
        """The first step after `step` at which any callback is due; the last step of the run is one."""
        training = self.run.config.training
        for later in count(step + 1):
            if later % training.save_steps == 0 or later >= training.max_steps or self.evaluation_due(later):
                break
            if self.restart_due(later) or self.probe_due(later):
                break
        return later

    def restart_due(self, step: int) -> bool:
        """Whether a restart takes place after update `step`."""
        return self.stage.is_low_rank and self.run.schedule.restart_due(step)

    def probe_due(self, step: int) -> bool:
        """Whether `step` is at most `training.probe_steps` past the last restart, the restart itself included."""
        schedule = self.run.schedule
        done, every = schedule.restarts_done(step), schedule.restart_every
        if not done or every is None:
            return False
        return step - schedule.warm_start_steps - done * every <= self.run.config.training.probe_steps

    def evaluation_due(self, step: int) -> bool:
        """At the start, the switch and the end of a run, and every `training.eval_steps`."""
        schedule = self.run.schedule
        ends = (0, schedule.warm_start_steps, schedule.max_steps)
        return step in ends or step % self.run.config.training.eval_steps == 0

    def asked_to_stop(self) -> bool:
        """Whether some process has been asked to stop. Collective: all get the same answer."""
        self.stop_request.num_moves += 1
        [num_asked] = self.engine.world.sum([float(self.stop_request.reason is not None)])
        return num_asked > 0

    def give_up_if_asked(self) -> None:
        """Raise `GivenUp` if some process has been asked to stop. Collective."""
        if self.asked_to_stop():
            raise GivenUp

    def too_late_to_save(self) -> bool:
        """Whether some process would be killed before the checkpoint is written. Collective."""
        is_late = self.stop_request.seconds_left() < self.checkpoints.expected_seconds()
        [num_late] = self.engine.world.sum([float(is_late)])
        return num_late > 0

    def catch_up(self, resumed: State) -> bool:
        """Run what was due at the step of a checkpoint and left undone.

        Two things can be outstanding: the restart at the former last step of a run that is now extended, and the
        evaluation that a stopped run deferred.

        Returns:
            Whether the run stops here, as it has been asked to by now; it is all to be done again then.
        """
        if self.stage.is_low_rank and self.run.schedule.restarts_done(resumed.step) > resumed.cycle:
            self.restart(resumed.step)
        if not resumed.evaluated:
            self.evaluate(resumed.step)
        return self.asked_to_stop()

    def restart_or_probe(self, step: int) -> None:
        """Restart where it is due; after the updates that follow one, log the loss on the probe rows."""
        if self.restart_due(step):
            self.restart(step)
        elif self.probe_due(step):
            self.tracker.line({"step": step, "probe_loss": self.probe_loss()})

    def restart(self, step: int) -> None:
        """Merge, reinit and reset, with the loss on the probe rows before and after in the metrics."""
        config, index = self.run.config, self.run.schedule.restarts_done(step)
        self.checkpoints.wait()  # the save in flight reads the frozen weights, which now change
        before, start_s = self.probe_loss(), time.perf_counter()
        with Traffic(self.engine.world.num_processes) as traffic:
            report = self.engine.restart(
                self.state,
                seed=config.seed,
                index=index,
                reinit=reinit_policy(config),
                optimizer_reset=config.relora.optimizer_reset,
                prune_ratio=config.relora.prune_ratio,
                carry_residual=config.relora.carry_residual,
            )
        costs = {"restart_seconds": time.perf_counter() - start_s, "bytes_sent": traffic.bytes_sent}
        if not self.engine.world.all_equal(self.engine.checksum(self.state)):
            raise RuntimeError(f"after the restart at step {step} the processes hold different weights")
        probes = {"probe_loss_before": before, "probe_loss_after": self.probe_loss()}
        if config.lora.base_dtype != "float32":
            with exact_weights(self.state.model, self.engine):
                probes["probe_loss_master"] = self.probe_loss()
        self.tracker.line({"step": step, "restart": index} | asdict(report) | costs | probes)
        self.tracker.spectra(self.spectra(), step)

    def evaluate(self, step: int) -> bool:
        """Log held-out loss and samples of text; False if it was given up, with nothing logged."""
        try:
            loss, samples = self.measure()
        except GivenUp:
            return False
        metrics = self.run.task.metrics(loss)
        self.tracker.line({"step": step, **metrics})
        others = {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "eval_loss"}
        details = "".join(f", {name} {value:.2f}" for name, value in others.items())
        self.tracker.log(f"step {step}: held-out loss {loss:.4f} nats{details}")
        for number, text in enumerate(samples):
            self.tracker.text(f"sample/{number}", text, step)
        if self.stage.is_low_rank and step == self.run.schedule.max_steps:
            self.tracker.spectra(self.spectra(), step)
        return True

    def measure(self) -> tuple[float, list[str]]:
        """Held-out loss and samples of text. `GivenUp` on all processes if some process has been asked to stop."""
        config, run, world = self.run.config, self.run, self.engine.world
        batches = eval_batches(
            run.data,
            config.data,
            batch_size=config.training.per_device_eval_batch_size or config.training.per_device_batch_size,
            process_index=world.process_index,
            num_processes=world.num_processes,
            make_batch=run.task.make_batch,
        )
        loss = held_out_loss(self.state, self.engine, batches, after_batch=self.give_up_if_asked)
        # A loss that is not finite leaves nothing to sample from; after skipped updates it can come to that.
        return loss, self.sample() if run.task.writes_text and math.isfinite(loss) else []

    def sample(self) -> list[str]:
        """Let the model continue the beginnings of held-out rows. `GivenUp` as in `measure`."""
        run, tokenizer, texts = self.run, self.run.data.tokenizer(), []
        # Processes may come to an end at different tokens: they can agree between texts alone.
        after_token = self.give_up_if_asked if self.engine.world.num_processes == 1 else lambda: None
        ids = next(eval_batches(run.data, run.config.data, batch_size=NUM_PROMPTS))["input_ids"][:, :PROMPT_TOKENS]
        for number, prompt in enumerate(tokenizer.batch_decode(ids, skip_special_tokens=True)):
            self.give_up_if_asked()
            with self.engine.inference(self.state):
                text = sample_text(
                    self.state.model,
                    tokenizer,
                    prompt,
                    max_new_tokens=SAMPLE_TOKENS,
                    temperature=0.8,
                    seed=number,
                    after_token=after_token,
                    together=self.engine.world.num_processes > 1,
                )
            texts.append(text)
        return texts

    def save(self, step: int, history: History, *, evaluated: bool = True) -> None:
        """Write a checkpoint; the metrics up to it are on the disk before it is.

        A run folder that was removed meanwhile is made anew.
        """
        folder = self.run.folder
        if self.checkpoints.writes and not folder.is_run:
            warn(f"{folder.path} was removed or moved before step {step}; it is made anew, without what was in it")
            write_settings(self.run, self.engine.world.num_processes)
        self.tracker.sync(step)
        facts = metrics_facts(folder.metrics) if self.checkpoints.writes else None
        self.checkpoints.save(
            self.state,
            self.engine,
            step,
            history=history,
            stage=self.stage.name,
            cycle=self.run.schedule.restarts_done(step),
            about={**self.run.about, "evaluated": evaluated, "metrics": facts and facts.model_dump()},
        )

    def probe_loss(self) -> float:
        """Loss on the first held-out rows, one by one: independent of the number of processes and the batch size."""
        rows = eval_batches(self.run.data, self.run.config.data, batch_size=1, make_batch=self.run.task.make_batch)
        self.stop_request.num_moves += 1
        # Never given up: what is known before a restart cannot be measured after it.
        return held_out_loss(self.state, self.engine, islice(rows, NUM_PROBE_ROWS), after_batch=lambda: None)

    @torch.no_grad()
    def spectra(self) -> dict[str, Tensor]:
        """Singular values of W + delta - W_start of a few layers; empty except on the first process. Collective."""
        layers, store = lora_layers(self.state.model), self.engine.store
        # Evenly spaced from the first to the last: different depths, and different kinds of layers.
        places = torch.linspace(0, len(layers) - 1, min(NUM_SPECTRA, len(layers))).round().int().tolist()
        spectra = {}
        for name in [list(layers)[place] for place in places]:
            layer = layers[name]
            A, B, W = (store.read(parameter) for parameter in (layer.lora_A, layer.lora_B, layer.weight))
            if self.stage_start:
                learned = W + lora_delta(A, B, layer.scale, transposed=layer.transposed).to(W.device)
                try:
                    learned -= self.stage_start[f"{name}.weight"].to(W.device)
                except UserError as error:  # removed since the stage began
                    self.tracker.log(f"no spectrum of {name}: {error}")
                    continue
                spectra[name] = torch.linalg.svdvals(learned).cpu()
        return spectra
