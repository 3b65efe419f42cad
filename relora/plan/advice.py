"""What of a plan its reader should know before the run."""

from collections.abc import Iterator

from relora.config import Config
from relora.config.derived import Plan, lora_config


def restart_advice(config: Config) -> Iterator[str]:
    """Restarts whose learning rate does not recover, and runs without restarts."""
    plan, rewarm = Plan(config), config.schedule.restart_warmup_steps
    every = plan.restart_every
    if not plan.has_low_rank_stage or every is None:
        return
    num_restarts = plan.restarts_done(plan.max_steps)
    if num_restarts == 0:
        yield (
            f"relora.restart_every = {every}: no restart comes before the end at {plan.max_steps}, so the update stays "
            f"of rank {config.lora.r}"
        )
        return
    last = plan.warm_start_steps + num_restarts * every
    if last < plan.max_steps < last + rewarm:
        yield (
            f"the restart at {last} is followed by {plan.max_steps - last} updates and a re-warm-up of {rewarm}: its "
            "learning rate never recovers before the end"
        )
    if every <= rewarm:
        yield (
            f"relora.restart_every = {every}: schedule.restart_warmup_steps = {rewarm}, so the learning rate is never "
            "down from one re-warm-up before the next begins"
        )


def route_advice(config: Config, *, break_even: int, ratio: float) -> Iterator[str]:
    """Low-rank updates that cost more than full-rank ones, and what keeps them from being cheaper."""
    r, lora = config.lora.r, lora_config(config)
    if r > break_even:
        yield (
            f"lora.r = {r}: above {break_even} low-rank updates need more FLOPs than full-rank ones (here {ratio:.2f} "
            "times as many)"
        )
    if lora.lora_dropout > 0:
        yield f"lora.lora_dropout = {lora.lora_dropout}: rules out the merged forward pass, one product with W + delta"
    if lora.base_dtype not in (None, "float32"):
        yield f"lora.base_dtype = {lora.base_dtype}: rules out the merged forward pass, W + delta would be rounded away"


def saving_advice(full: int, low: int) -> Iterator[str]:
    """Low-rank training that saves no memory. `full` and `low` are the peaks of the two stages."""
    if low >= full:
        yield f"low rank takes no less memory than full rank: {low / 2**20:,.0f} MiB against {full / 2**20:,.0f}"


def room_advice(stage: str, peak: int, *, room: float | None) -> Iterator[str]:
    """A stage that does not fit into `room` bytes of a device, if that is known."""
    if room is not None and peak > room:
        yield (
            f"stage {stage} needs {peak / 2**30:.1f} GiB and the device leaves {room / 2**30:.1f}: try "
            "model.gradient_checkpointing, a smaller training.per_device_batch_size, or an engine that shards"
        )
