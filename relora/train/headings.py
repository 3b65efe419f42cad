"""What the screen shows of a run before it trains, and of each stage."""

import torch

import relora
from relora.checkpoint.state import State
from relora.config.derived import derived_numbers
from relora.engines import Engine
from relora.train.run import Run
from relora.train.stages import Stage


def header(run: Run, engine: Engine, state: State) -> str:
    """The engine that really runs, the data, and what the settings amount to."""
    training, world = run.config.training, engine.world
    numbers = derived_numbers(run.config, world.num_processes)
    lines = [
        f"relora {relora.__version__}: engine {engine.name}, processes {world.num_processes}, device {world.device}, "
        f"mixed precision {training.mixed_precision}, torch {torch.__version__}",
        run.data.summary(),
        ", ".join(f"{key} {value:,}" for key, value in numbers.items()),
    ]
    if training.method == "full":
        lines.append("training.method = full: the settings of relora and lora are not used")
    lines += run.usage.lines()
    if state.stage is not None:
        lines.append(f"resuming from step {state.step}")
    return "\n".join(lines)


def title(stage: Stage) -> str:
    """The heading of a stage on the screen."""
    return f"stage {stage.name}: {'low' if stage.is_low_rank else 'full'}-rank to step {stage.end}"
