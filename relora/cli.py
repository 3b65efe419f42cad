"""Commands -> functions, nothing else.

Each command is imported when it runs: `relora --help` and a mistake in a config load no torch.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import relora
from relora.errors import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    Failed,
    Stopped,
    UserError,
    disk_failure,
    leave_for_launcher,
)
from relora.files import expand_path
from relora.train.signals import stop_signals


def program() -> None:
    """`relora` on the command line: as `main`, but the process ends, and no signal comes between."""
    code = EXIT_STOPPED
    with suppress(Stopped), stop_signals(restores=False):  # now, as to load the other libraries takes seconds
        code = main()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 after a failure, 2 after a mistake of the user, 143 if the command was asked to stop.
    """
    options = _parse(_parser(), arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # `module:attribute` in a config may be a file in the working folder, which `python -m relora` alone finds.
    if not {str(Path.cwd()), ""} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    try:
        with errors_for_launcher(), stop_signals():
            run_command(options)
    except UserError as error:
        for problem in error.problems:
            print(f"relora: {problem}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stopped:
        print(f"relora: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except Failed as failed:
        print(f"relora: {failed}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        line = disk_failure(error)
        if line is None:
            raise
        print(f"relora: {line}", file=sys.stderr)
        return EXIT_FAILED
    return 0


@contextmanager
def errors_for_launcher() -> Iterator[None]:
    """Leave an error to torchrun: a line if it is one of ours, else its traceback."""
    try:
        yield
    except BaseException as error:
        is_ours = isinstance(error, UserError | Failed | Stopped)
        leave_for_launcher(f"relora: {error}" if is_ours else traceback.format_exc())
        raise


def run_command(options: argparse.Namespace) -> None:
    """Call the function of the command with the options as its arguments, the config loaded before torch is."""
    from relora.config import Config, load_config

    arguments = vars(options)
    function = arguments.pop("function")
    if isinstance(arguments.get("config"), str):
        arguments["config"] = load_config(arguments["config"], arguments.pop("overrides", ()))
    config = arguments.get("config")
    timeout_s = config.hub_timeout_s if isinstance(config, Config) else Config.model_fields["hub_timeout_s"].default
    module, _, name = function.partition(":")
    with importlib.import_module("relora.hub").bounded(timeout_s):
        getattr(importlib.import_module(module), name)(**arguments)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command; overrides may stand before and after flags, which argparse alone refuses."""
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    """One subparser for each row of COMMANDS."""
    parser = argparse.ArgumentParser(
        prog="relora",
        description="Train transformer models with ReLoRA.",
        epilog=_examples([command.examples[0] for command in COMMANDS.values()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"relora {relora.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=_examples(command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for argument in command.arguments:
            subparser.add_argument(*argument.names, **argument.options)
        subparser.set_defaults(function=command.function)
    return parser


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(["examples:", *(f"  relora {line}" for line in lines)])


def _path(text: str) -> str:
    """A path with ~ and $VARIABLES expanded, which a shell does not do everywhere: not in --output=~/x."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


class Argument:
    """The arguments of one call of `ArgumentParser.add_argument`."""

    def __init__(self, *names: str, help: str, **options: Any) -> None:
        self.names = names
        self.options = {"help": help, **options}


@dataclass(frozen=True)
class Command:
    """One command: its function as module:name, a line of help, its examples, and its arguments, named as there."""

    function: str
    help: str
    examples: Sequence[str]
    arguments: Sequence[Argument]


CONFIG = (
    Argument("config", metavar="CONFIG", help="the configuration file, such as configs/quickstart.yaml"),
    Argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that replace those of the file, such as training.max_steps=500 lora.r=64",
    ),
)
RUN_OR_MODEL = Argument(
    "run_or_model",
    type=_path,
    metavar="RUN_OR_MODEL",
    help="a run folder (its newest checkpoint), a folder with a model, or a hub id, such as runs/quickstart or gpt2",
)
COMMANDS = {
    "prepare": Command(
        function="relora.commands.prepare:prepare",
        help="tokenize the sources of a config and write the tokens to disk",
        examples=["prepare configs/quickstart.yaml", "prepare configs/llama_60m.yaml data.num_proc=8"],
        arguments=CONFIG,
    ),
    "train": Command(
        function="relora.train.train:train",
        help="train, or resume from the newest checkpoint",
        examples=[
            "train configs/quickstart.yaml",
            "train configs/quickstart.yaml output_dir=runs/second lora.r=64 --dry-run",
            "train configs/quickstart.yaml training.max_steps=2000 --extend",
        ],
        arguments=(
            *CONFIG,
            Argument("--dry-run", action="store_true", help="build the model, run one forward pass, and stop"),
            Argument(
                "--extend",
                action="store_true",
                help="resume a run with a larger training.max_steps than it began with, such as "
                "training.max_steps=2000 after 1000",
            ),
            Argument(
                "--strict",
                action="store_true",
                help="refuse to resume where the newest checkpoint is damaged (default: it is set aside, and the one "
                "before is used)",
            ),
        ),
    ),
    "plan": Command(
        function="relora.commands.plan:plan",
        help="forecast the memory, FLOPs and traffic of a run, without training",
        examples=[
            "plan configs/quickstart.yaml",
            "plan configs/llama_1b.yaml --engine fsdp2 --processes 8 --device-memory 80 --json plan.json",
        ],
        arguments=(
            *CONFIG,
            Argument("--engine", help="one, ddp, fsdp2, zero1, zero2 or zero3, such as ddp (default: the launcher's)"),
            Argument(
                "--processes",
                dest="num_processes",
                type=int,
                metavar="N",
                help="number of processes, such as 8 (default: the launcher's)",
            ),
            Argument(
                "--device-memory",
                dest="device_gib",
                type=float,
                metavar="GIB",
                help="memory of one GPU in GiB, such as 80",
            ),
            Argument(
                "--json",
                type=_path,
                dest="json_path",
                metavar="FILE",
                help="also write the numbers to this file, such as plan.json",
            ),
        ),
    ),
    "eval": Command(
        function="relora.commands.eval:evaluate",
        help="measure loss and perplexity on held-out text",
        examples=["eval runs/quickstart", "eval gpt2 --config configs/continue_pretrained.yaml"],
        arguments=(
            RUN_OR_MODEL,
            Argument("--config", help="the held-out text for a model of no run, such as configs/quickstart.yaml"),
        ),
    ),
    "export": Command(
        function="relora.commands.export:export",
        help="write the model of a run as a plain Hugging Face folder, with all updates merged",
        examples=["export runs/quickstart --output exported", "export runs/quickstart --output half --dtype bfloat16"],
        arguments=(
            Argument("run", type=_path, metavar="RUN", help="the run folder, such as runs/quickstart"),
            Argument("--output", type=_path, required=True, help="the folder to write, a new one, such as exported"),
            Argument(
                "--dtype",
                choices=("float32", "bfloat16", "float16"),
                default="float32",
                help="dtype of the weights, such as bfloat16 (default: %(default)s)",
            ),
            Argument("--step", type=int, help="step of the checkpoint to export, such as 1000 (default: the newest)"),
        ),
    ),
    "report": Command(
        function="relora.commands.report:report",
        help="plot the metrics of one or several runs on one HTML page",
        examples=["report runs/quickstart", "report runs/low_rank runs/full_rank --output comparison"],
        arguments=(
            Argument("runs", type=_path, metavar="RUN", nargs="+", help="run folders, such as runs/low_rank"),
            Argument(
                "--output",
                type=_path,
                help="the folder to write, such as comparison (default: the first run's report/)",
            ),
        ),
    ),
    "status": Command(
        function="relora.commands.status:status",
        help="tell how far a run is, whether it lives and where, and when it will end",
        examples=["status runs/quickstart", "status runs/quickstart --json"],
        arguments=(
            Argument("run", type=_path, metavar="RUN", help="the run folder, such as runs/quickstart"),
            Argument("--json", dest="as_json", action="store_true", help="print one JSON object instead of lines"),
        ),
    ),
    "generate": Command(
        function="relora.commands.generate:generate",
        help="continue a prompt with sampled text",
        examples=['generate runs/quickstart --prompt "def main" --max-new-tokens 50 --temperature 0.8 --seed 1'],
        arguments=(
            RUN_OR_MODEL,
            Argument("--prompt", required=True, help='the text to continue, such as "def main"'),
            Argument(
                "--max-new-tokens", type=int, default=100, help="tokens to add, such as 50 (default: %(default)s)"
            ),
            Argument(
                "--temperature",
                type=float,
                default=0.8,
                help="randomness of the sampling, such as 0.8; 0 takes the likeliest token (default: %(default)s)",
            ),
            Argument("--seed", type=int, default=0, help="seed of the sampling, such as 1 (default: %(default)s)"),
            Argument(
                "--trust-remote-code",
                action="store_true",
                help="run code that comes with a model of no run; read it first, such as that of gpt2",
            ),
        ),
    ),
}
