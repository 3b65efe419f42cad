"""`relora plan CONFIG`: what a run will need, before anything is downloaded, prepared or trained."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from relora.config import Config, raise_if_any
from relora.config.derived import accumulation_steps
from relora.engines import launched_engine, launched_num_processes, launched_zero_stage
from relora.files import folder_problems, write_json
from relora.forecast.dry_run import kernel_known_here
from relora.forecast.engine_costs import ENGINES, EngineName, Launch
from relora.forecast.forecast import Forecast, forecast
from relora.forecast.memory import RESERVED_SHARE, StageMemory
from relora.model.model import load_hf_config
from relora.model.tasks import task_of
from relora.train.preflight import model_problems

MIB = 2**20
TITLES = {"full_rank": "full rank", "low_rank": "low rank"}


def plan(
    config: Config,
    *,
    engine: EngineName | None = None,
    num_processes: int | None = None,
    device_gib: float | None = None,
    json_path: str | None = None,
) -> None:
    """Print the plan of a run; engine and processes are the launcher's unless they are given.

    Raises:
        UserError: the model cannot be built or trained so, the batch cannot be divided, an option is wrong.
    """
    launch = launch_of(engine, num_processes)
    raise_if_any([*_option_problems(device_gib, json_path), *_batch_problems(config, launch)])
    hf_config = load_hf_config(config.model)
    here = config.model_copy(update={"model": kernel_known_here(config.model)})
    raise_if_any(model_problems(here, hf_config, task_of(here)))
    seen = forecast(here, hf_config, launch, device_gib=device_gib)
    print("\n".join(page(seen)))
    if json_path is not None:
        write_json(Path(json_path), seen.as_dict())


def launch_of(engine: EngineName | None, num_processes: int | None) -> Launch:
    """The launch that is asked for, completed by what the launcher's environment says."""
    n = num_processes if num_processes is not None else launched_num_processes()
    return Launch(engine or _launched(n), n, on_gpu=torch.cuda.is_available())


def _launched(num_processes: int) -> EngineName:
    match launched_engine():
        case "fsdp2":
            return "fsdp2"
        case "deepspeed":
            return ENGINES[ENGINES.index("zero1") + launched_zero_stage() - 1]
        case "local":
            return "one" if num_processes == 1 else "ddp"


def page(seen: Forecast) -> Iterator[str]:
    """The plan, for people."""
    launch = seen.launch
    where = "a GPU each" if launch.on_gpu else "on the CPU, in memory of the host"
    yield f"plan: engine {launch.engine}, processes {launch.num_processes}, {where}"
    yield ", ".join(f"{key} {value:,}" for key, value in seen.numbers.items())
    for name, model in seen.models.items():
        yield f"\nparameters, {TITLES[name]}\n{model.parameter_report.table()}"
    yield f"\nmemory of one process, MiB {_heads(seen)}"
    yield from _memory(list(seen.memory.values()))
    yield from _compute(seen)
    yield from _traffic(seen)
    yield from _gpus(seen)
    yield from (f"\nnote: {line}" for line in seen.advice)


def _heads(seen: Forecast) -> str:
    return "".join(f"{TITLES[name]:>14}" for name in seen.memory).rjust(_WIDTH)


_WIDTH = 44


def _row(name: str, values: Iterable[str]) -> str:
    return f"  {name:<42}" + "".join(f"{value:>14}" for value in values)


def _memory(stages: Sequence[StageMemory]) -> Iterator[str]:
    for kind in stages[0].device:
        values = [stage.device[kind] for stage in stages]
        if any(values):
            yield _row(kind, map(_mib, values))
    yield _row("= peak of an update", [_mib(stage.update) for stage in stages])
    if any(stage.restart is not None for stage in stages):
        yield _row("peak of a restart", ["" if stage.restart is None else _mib(stage.restart) for stage in stages])
    yield _row("peak of a save", [_mib(stage.save) for stage in stages])
    for kind in sorted({kind for stage in stages for kind in stage.host}):
        yield _row(f"host: {kind}", [_mib(stage.host[kind]) if kind in stage.host else "" for stage in stages])
    if any(stage.save_host for stage in stages):
        yield _row("host: one tensor of a save", [_mib(stage.save_host) for stage in stages])


def _compute(seen: Forecast) -> Iterator[str]:
    compute = seen.compute
    updates = [compute.full_rank, *([compute.low_rank] if compute.low_rank else [])]
    yield "\nTFLOPs of an update, all processes"
    for kind in ("wrapped", "rest", "attention", "total"):
        names = {"wrapped": "wrapped layers", "rest": "other layers (output head)"}
        yield _row(names.get(kind, kind), [f"{getattr(update, kind) / 1e12:,.3f}" for update in updates])
    if compute.low_rank:
        yield (
            f"  expected time of an update, low rank / full rank: {compute.expected_ratio:.2f} by products alone; "
            f"{compute.merged_layers} of {compute.wrapped_layers} layers merged\n"
            f"  low rank costs less up to r = {compute.break_even_rank}"
        )


def _traffic(seen: Forecast) -> Iterator[str]:
    if seen.launch.num_processes == 1:
        return
    yield "\nMiB that one process sends, at most"
    yield _row("in an update", [_mib(sent.update) for sent in seen.sent.values()])
    yield _row("at a restart", [_mib(sent.restart) if name == "low_rank" else "" for name, sent in seen.sent.items()])


def _gpus(seen: Forecast) -> Iterator[str]:
    held_back = f"{RESERVED_SHARE:.0%} held back for the context, workspaces and gaps"
    yield f"\nlargest training.per_device_batch_size by size of GPU ({held_back})"
    yield _row("", [*(TITLES[name] for name in seen.fits[0].largest), "use at most"])
    for size in seen.fits:
        cells = [*size.largest.values(), size.usable]
        yield _row(f"{size.gib:g} GiB", ["none" if cell is None else f"{cell:,}" for cell in cells])


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.1f}"


def _option_problems(device_gib: float | None, json_path: str | None) -> list[str]:
    problems = [] if json_path is None else folder_problems(f"--json {json_path}", str(Path(json_path).parent))
    if device_gib is not None and not device_gib > 0:
        problems.append(f"--device-memory {device_gib:g}: must be > 0")
    return problems


def _batch_problems(config: Config, launch: Launch) -> list[str]:
    try:
        accumulation_steps(config, launch.num_processes)
    except ValueError as error:
        return [str(error)]
    return []
