"""`relora plan CONFIG`: what a run will need, before anything is downloaded, prepared or trained."""

from collections.abc import Iterable
from pathlib import Path

import torch

from relora.config import Config, raise_if_any
from relora.config.derived import accumulation_steps
from relora.engines import launched_engine, launched_num_processes
from relora.engines.deepspeed_config import launched_zero_stage
from relora.files import folder_problems, write_json
from relora.forecast.dry_run import with_known_attention
from relora.forecast.engine_costs import ENGINE_NAMES, EngineName, Launch
from relora.forecast.forecast import Forecast, forecast
from relora.forecast.memory import RESERVED_SHARE
from relora.model.model import load_hf_config
from relora.model.tasks import task_of
from relora.train.preflight import check_model

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
    """Print the forecast of a run; engine and processes are the launcher's unless they are given.

    Raises:
        UserError: the model cannot be built or trained so, the batch cannot be divided, an option is wrong.
    """
    launch = launch_of(engine, num_processes)
    problems = [] if json_path is None else folder_problems(f"--json {json_path}", str(Path(json_path).parent))
    if device_gib is not None and not device_gib > 0:
        problems.append(f"--device-memory {device_gib:g}: must be > 0")
    try:
        accumulation_steps(config, launch.num_processes)
    except ValueError as error:
        problems.append(str(error))
    raise_if_any(problems)
    hf_config = load_hf_config(config.model, task_of(config))
    config = config.model_copy(update={"model": with_known_attention(config.model)})
    _, problems = check_model(config, hf_config, task_of(config))
    raise_if_any(problems)
    result = forecast(config, hf_config, launch, device_gib=device_gib)
    print("\n".join(page(result)))
    if json_path is not None:
        write_json(Path(json_path), result.as_dict())


def launch_of(engine: EngineName | None, num_processes: int | None) -> Launch:
    """The launch that is asked for, completed from the launcher's environment."""
    n = num_processes if num_processes is not None else launched_num_processes()
    if engine is None:
        match launched_engine():
            case "fsdp2":
                engine = "fsdp2"
            case "deepspeed":
                engine = ENGINE_NAMES[ENGINE_NAMES.index("zero1") + launched_zero_stage() - 1]
            case "ddp":
                engine = "one" if n == 1 else "ddp"
    return Launch(engine, n, on_gpu=torch.cuda.is_available())


def page(result: Forecast) -> list[str]:
    """The forecast as lines of text."""
    launch = result.launch
    where = "a GPU each" if launch.on_gpu else "on the CPU, in memory of the host"
    lines = [
        f"plan: engine {launch.engine}, processes {launch.num_processes}, {where}",
        ", ".join(f"{key} {value:,}" for key, value in result.numbers.items()),
    ]
    for name, model in result.models.items():
        lines.append(f"\nparameters, {TITLES[name]}\n{model.parameter_report.table()}")
    lines += memory_lines(result) + compute_lines(result) + traffic_lines(result) + batch_lines(result)
    return lines + [f"\nnote: {line}" for line in result.advice]


def memory_lines(result: Forecast) -> list[str]:
    """The memory of one process: a row for each component that some stage has, a column for each stage."""
    stages = list(result.memory.values())
    lines = [f"\nmemory of one process, MiB {''.join(f'{TITLES[name]:>14}' for name in result.memory).rjust(44)}"]
    for kind in stages[0].device:
        if any(stage.device[kind] for stage in stages):
            lines.append(row(kind, [mib(stage.device[kind]) for stage in stages]))
    lines.append(row("= peak of an update", [mib(stage.update) for stage in stages]))
    if any(stage.restart is not None for stage in stages):
        cells = ["" if stage.restart is None else mib(stage.restart) for stage in stages]
        lines.append(row("peak of a restart", cells))
    lines.append(row("peak of a save", [mib(stage.save) for stage in stages]))
    for kind in sorted({kind for stage in stages for kind in stage.host}):
        cells = [mib(stage.host[kind]) if kind in stage.host else "" for stage in stages]
        lines.append(row(f"host: {kind}", cells))
    if any(stage.save_host for stage in stages):
        lines.append(row("host: copies of a save, first process", [mib(stage.save_host) for stage in stages]))
    return lines


def compute_lines(result: Forecast) -> list[str]:
    """The FLOPs of an update by part, a column for each stage, and how low rank compares."""
    compute = result.compute
    updates = [compute.full_rank, *([compute.low_rank] if compute.low_rank else [])]
    lines = ["\nTFLOPs of an update, all processes"]
    names = {
        "wrapped": "wrapped layers",
        "rest": "other layers (output head)",
        "attention": "attention",
        "total": "total",
    }
    for part, name in names.items():
        lines.append(row(name, [f"{getattr(update, part) / 1e12:,.3f}" for update in updates]))
    if compute.low_rank:
        lines += [
            f"  expected time of an update, low rank / full rank: {compute.expected_ratio:.2f} by products alone; "
            f"{compute.merged_layers} of {compute.wrapped_layers} layers merged",
            f"  low rank costs less up to r = {compute.break_even_rank}",
        ]
    return lines


def traffic_lines(result: Forecast) -> list[str]:
    """The bytes that one process sends, a column for each stage; nothing for a single process."""
    if result.launch.num_processes == 1:
        return []
    restarts = [mib(sent.restart) if name == "low_rank" else "" for name, sent in result.sent.items()]
    return [
        "\nMiB that one process sends, at most",
        row("in an update", [mib(sent.update) for sent in result.sent.values()]),
        row("at a restart", restarts),
    ]


def batch_lines(result: Forecast) -> list[str]:
    """The largest batches that fit: a row for each size of GPU, a column for each stage and one for both."""
    reserved = f"{RESERVED_SHARE:.0%} held back for the context, workspaces and gaps"
    lines = [
        f"\nlargest training.per_device_batch_size by size of GPU ({reserved})",
        row("", [*(TITLES[name] for name in result.fits[0].largest), "use at most"]),
    ]
    for size in result.fits:
        cells = [*size.largest.values(), size.usable]
        lines.append(row(f"{size.gib:g} GiB", ["none" if cell is None else f"{cell:,}" for cell in cells]))
    return lines


def row(name: str, cells: Iterable[str]) -> str:
    """A row of a table: a name of 42 characters, cells of 14."""
    return f"  {name:<42}" + "".join(f"{cell:>14}" for cell in cells)


def mib(num_bytes: float) -> str:
    """Bytes in MiB, with one decimal."""
    return f"{num_bytes / MIB:,.1f}"
