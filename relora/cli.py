"""Commands -> functions, nothing else."""

import argparse
import os
import sys
from collections.abc import Sequence

from relora.config import Config, UserError, load_config
from relora.errors import EXIT_STOPPED, EXIT_USER_ERROR, Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 after a mistake of the user, 143 if the run was asked to stop."""
    options = _read(_parser(), arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options.run(options)
    except UserError as error:
        for problem in error.problems:
            print(f"relora: {problem}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stopped:
        print(f"relora: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    return 0


def _read(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command; overrides may stand before and after flags, which argparse alone refuses."""
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="relora", description="Train language models with ReLoRA.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = _with_config(commands.add_parser("prepare", help="sources -> tokens on disk"))
    prepare.set_defaults(run=_prepare)

    train = _with_config(commands.add_parser("train", help="train, or go on from the newest checkpoint"))
    train.add_argument("--dry-run", action="store_true", help="stop after building and one forward pass")
    train.add_argument(
        "--extend", action="store_true", help="allow a longer training.max_steps than the run began with"
    )
    train.set_defaults(run=_train)

    plan = _with_config(commands.add_parser("plan", help="what a run will need: memory, FLOPs, traffic"))
    plan.add_argument("--engine", help="one, ddp, fsdp2, zero1, zero2 or zero3 (default: the launcher's)")
    plan.add_argument("--processes", type=int, metavar="N", help="how many (default: the launcher's)")
    plan.add_argument("--device-memory", type=float, metavar="GB", help="of one GPU, in GiB")
    plan.add_argument("--json", metavar="FILE", help="write the numbers there too")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("eval", help="held-out loss and perplexity")
    evaluate.add_argument("run_or_model", metavar="RUN_OR_MODEL")
    evaluate.add_argument("--config", help="what to evaluate a model on that belongs to no run")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="a plain Hugging Face folder of a run")
    export.add_argument("run_folder", metavar="RUN")
    export.add_argument("--output", required=True, help="the folder to write; it must not exist")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    export.add_argument("--step", type=int, help="the checkpoint to export (default: the newest)")
    export.set_defaults(run=_export)

    report = commands.add_parser("report", help="pictures and one HTML page of one run or several")
    report.add_argument("run_folders", metavar="RUN", nargs="+")
    report.add_argument("--output", help="the folder to write (default: report/ in the first run)")
    report.set_defaults(run=_report)

    generate = commands.add_parser("generate", help="sample text")
    generate.add_argument("run_or_model", metavar="RUN_OR_MODEL")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=100)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(run=_generate)
    return parser


def _with_config(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("config", metavar="CONFIG")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    return command


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.overrides)


# The imports stand in the functions: `relora --help` and a mistake in a config need no torch.
def _prepare(options: argparse.Namespace) -> None:
    from relora.commands.prepare import prepare

    prepare(_config(options))


def _train(options: argparse.Namespace) -> None:
    config = _config(options)
    from relora.train.train import train

    train(config, dry_run=options.dry_run, extend=options.extend)


def _plan(options: argparse.Namespace) -> None:
    config = _config(options)
    from relora.commands.plan import plan

    plan(
        config,
        engine=options.engine,
        num_processes=options.world,
        device_gib=options.device_memory,
        json_path=options.json,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from relora.commands.eval import evaluate

    evaluate(options.run_or_model, load_config(options.config) if options.config else None)


def _export(options: argparse.Namespace) -> None:
    from relora.commands.export import export

    export(options.run_folder, options.output, dtype=options.dtype, step=options.step)


def _report(options: argparse.Namespace) -> None:
    from relora.commands.report import report

    report(options.run_folders, options.output)


def _generate(options: argparse.Namespace) -> None:
    from relora.commands.generate import generate

    generate(
        options.run_or_model,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
