"""A run whose files are damaged one at a time: does it end with the same weights, or say in one line why it does not?

    python -m benchmarks.reliability                      # everything, about 20 minutes on two cores
    python -m benchmarks.reliability --sample 40          # so many cases, drawn by --seed
    python -m benchmarks.reliability --write docs/results/reliability.md

One tiny run is stopped halfway, another has finished; there are prepared data. Each case damages a copy and gives the
command again, in this process. It counts as recovered if the final weights, the checkpoint of the last step and the
metrics are those of a run without damage; lines of metrics may be missing where a warning says so. A refusal is the
exit code 2 with one line, and the folder as it was, a lock and a status apart.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import yaml

from benchmarks.damage import FILE_DAMAGES, bit_flips, flip, json_edits, swap
from benchmarks.tables import machine, table, write_section

END, HALFWAY, BEFORE = 8, 6, 5
RECOVERED, REFUSED, TRACEBACK, OTHER = "recovered", "refused", "traceback", "other result"


@dataclass(frozen=True)
class Case:
    """One damage.

    Attributes:
        target: the run that is copied: "halfway" or "finished", or one that `Target.make` knows.
        file: path in the copy, as shown in the table.
        damage: the kind, a column of the table.
        apply: damages the copy, whose folder it is given.
    """

    target: str
    file: str
    damage: str
    apply: Callable[[Path], Any]


@dataclass
class Target:
    """Something to be damaged, and what to do then.

    Attributes:
        folder: copied for each case.
        cases: the cases, for this folder.
        use: works with the damaged copy, and returns what must equal `expected`; raises UserError to refuse.
    """

    folder: Path
    cases: Callable[[Path], Iterator[Case]]
    use: Callable[[Path], Any]
    expected: Any = field(default=None)


@dataclass(frozen=True)
class Outcome:
    """The end of a case: one of the four, and what the command said."""

    case: Case
    kind: str
    said: str


def main() -> None:
    """Run the cases, print the table, and exit with 1 if one ended otherwise than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="run so many cases only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="write the section there, such as docs/results/reliability.md")
    options = parser.parse_args()
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(Path(folder), sample=options.sample, seed=options.seed, show=sys.stderr)
    text = section(found, seconds=time.monotonic() - start_s)
    print(text)
    if options.write is not None:
        write_section(options.write, "Damage", text)
    sys.exit(any(outcome.kind in (TRACEBACK, OTHER) for outcome in found))


def outcomes(folder: Path, *, sample: int | None, seed: int, show: Any = None) -> list[Outcome]:
    """Make the runs in `folder` and try the cases, or `sample` of them."""
    os.environ["RELORA_CACHE"] = str(folder / "cache")
    targets = make_targets(folder)
    chosen = [case for target in targets.values() for case in target.cases(target.folder)]
    if sample is not None:
        chosen = some_of(chosen, sample, random.Random(seed))
    found = []
    for number, each in enumerate(chosen, 1):
        outcome = attempt(each, targets[each.target], folder / "case")
        found.append(outcome)
        if show is not None:
            case = outcome.case
            told = f"{outcome.kind}: {case.target} {case.file} {case.damage}: {outcome.said}"
            print(f"{number}/{len(chosen)} {told}", file=show)
    return found


def some_of(cases: Sequence[Case], count: int, rng: random.Random) -> list[Case]:
    """So many of the cases: one of each file in turn, so that a file with many fields does not hide the others."""
    files: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        files.setdefault((case.target, case.file), []).append(case)
    groups = [rng.sample(group, len(group)) for group in files.values()]
    rng.shuffle(groups)
    in_turn = (case for rank in zip_longest(*groups) for case in rank if case is not None)
    chosen = set(islice(in_turn, count))
    return [case for case in cases if case in chosen]


def make_targets(folder: Path) -> dict[str, Target]:
    """The targets by name."""
    from relora.config import check
    from relora.train.train import train

    tree = settings(folder)
    quietly(lambda: train(check(tree)))
    finished = Path(tree["output_dir"])
    halfway = folder / "halfway"
    copy_run(finished, halfway)
    shutil.rmtree(halfway / "final")
    for step in range(HALFWAY + 1, END + 1):
        shutil.rmtree(halfway / "checkpoints" / f"step-{step:08d}")
    use = partial(train_again, tree)
    expected = result_of(finished)
    prepared, tokens = folder / "prepared", partial(prepare_again, tree)
    tokens(prepared)
    return {
        "halfway": Target(halfway, halfway_cases, use, expected),
        "finished": Target(finished, finished_cases, use, expected),
        "exported": Target(halfway, exported_cases, export_again, quietly(lambda: export_again(halfway))[0]),
        "prepared": Target(prepared, prepared_cases, tokens, quietly(lambda: tokens(prepared))[0]),
    }


def settings(folder: Path) -> dict[str, Any]:
    """A run of eight updates: warm start of 2, restarts at 4 and 6, a checkpoint after each."""
    from tests.helpers import tiny

    (folder / "corpus").mkdir(parents=True)
    return tiny.settings(
        tiny.write_corpus(folder / "corpus"),
        folder / "run",
        model={"config": tiny.MODEL | {"num_hidden_layers": 1}},
        relora={"restart_every": 2, "warm_start_steps": 2},
        training={
            "max_steps": END,
            "global_batch_size": 4,
            "per_device_batch_size": 4,
            "mixed_precision": "no",
            "eval_steps": 2,
            "save_steps": 1,
            "save_total_limit": None,
            "logging_steps": 1,
            "report_to": [],
        },
    )


def copy_run(source: Path, target: Path) -> None:
    """Copy a run folder with its hard links."""
    names: dict[int, Path] = {}

    def copy(source: str, target: str) -> None:
        inode = Path(source).stat().st_ino
        if inode in names:
            os.link(names[inode], target)
        else:
            shutil.copy2(source, target)
            names[inode] = Path(target)

    shutil.copytree(source, target, copy_function=copy, symlinks=True)


# --- the cases


def halfway_cases(run: Path) -> Iterator[Case]:
    """All files of the newest checkpoint, and of the run folder."""
    newest, before = (Path("checkpoints") / f"step-{step:08d}" for step in (HALFWAY, BEFORE))
    of_checkpoint = [newest / path.name for path in sorted((run / newest).iterdir())]
    others = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    others = [path for path in others if path.parts[0] != "checkpoints" and path.name != ".lock"]
    for file in (*of_checkpoint, *others):
        yield from file_cases("halfway", file)
    for file in of_checkpoint:
        if (run / before / file.name).exists():
            yield Case("halfway", str(file), "that of another step", at(file, swap(run / before / file.name)))
    manifest = newest / "MANIFEST.json"
    yield from edits("halfway", manifest, run)
    for _, damage in bit_flips(run / manifest, 100, 0):
        yield Case("halfway", str(manifest), "one bit flipped", at(manifest, damage))
    yield from edits("halfway", Path("stage_start/MANIFEST.json"), run)
    yield from edits("halfway", Path("status.json"), run)
    yield from edits("halfway", Path("config.yaml"), run)
    yield from metrics_cases(run)
    yield from folder_cases(newest)


def finished_cases(run: Path) -> Iterator[Case]:
    """All files of final/."""
    for path in sorted((run / "final").iterdir()):
        if path.name != "README.md":  # the user's own from then on
            yield from file_cases("finished", path.relative_to(run))
    yield from edits("finished", Path("final/relora.json"), run)
    yield Case("finished", "final/", "a link instead", lambda copy: move_behind_link(copy / "final"))
    yield Case("finished", "final/", "deleted", lambda copy: shutil.rmtree(copy / "final"))


def exported_cases(run: Path) -> Iterator[Case]:
    """What `relora export` reads of a run: its configuration, its tokenizer, its newest checkpoint."""
    newest = Path("checkpoints") / f"step-{HALFWAY:08d}"
    tokenizer = [path.relative_to(run) for path in sorted((run / "tokenizer").iterdir())]
    for file in (newest / "MANIFEST.json", newest / "trained-00001.safetensors", Path("config.yaml"), *tokenizer):
        yield from file_cases("exported", file)
    yield from edits("exported", newest / "MANIFEST.json", run)
    yield from edits("exported", Path("config.yaml"), run)


def prepared_cases(folder: Path) -> Iterator[Case]:
    """All files of prepared data, which are verified when they are first used at their place."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            yield from file_cases("prepared", path.relative_to(folder))
    manifest = Path("manifest.json")
    yield from edits("prepared", manifest, folder)
    for _, damage in bit_flips(folder / manifest, 100, 0):
        yield Case("prepared", str(manifest), "one bit flipped", at(manifest, damage))


def file_cases(target: str, file: Path) -> Iterator[Case]:
    """The damages that any file can suffer."""
    for kind, damage in FILE_DAMAGES.items():
        yield Case(target, str(file), kind, at(file, damage))


def edits(target: str, file: Path, run: Path) -> Iterator[Case]:
    """A JSON or YAML file, edited field by field."""
    is_yaml = file.suffix == ".yaml"
    for name, how, content in json_edits(run / file, yaml.safe_load if is_yaml else json.loads):
        text = yaml.safe_dump(content, sort_keys=False) if is_yaml else json.dumps(content, indent=1)
        yield Case(target, str(file), f"{name}: {how}", at(file, lambda path, text=text: path.write_text(text)))


def metrics_cases(run: Path) -> Iterator[Case]:
    """metrics.jsonl with lines left out, twice, out of order, and of other values."""
    file = Path("metrics.jsonl")
    lines = (run / file).read_text().splitlines(keepends=True)
    for number in range(0, len(lines), 3):
        rest = [*lines[:number], *lines[number + 1 :]]
        garbled = [*lines[:number], lines[number][:20] + "\n", *lines[number + 1 :]]
        for kind, content in (("a line left out", rest), ("a line garbled", garbled)):
            yield Case("halfway", str(file), kind, at(file, lambda path, rest=content: path.write_text("".join(rest))))
    for kind, content in (("lines twice", lines * 2), ("lines reversed", lines[::-1])):
        yield Case("halfway", str(file), kind, at(file, lambda path, rest=content: path.write_text("".join(rest))))


def folder_cases(newest: Path) -> Iterator[Case]:
    """Files, folders and links where they do not belong; several checkpoints damaged at once."""

    def put_file(path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.write_text("a file")

    places: dict[str, Callable[[Path], Any]] = {
        "a file instead": put_file,
        "a link instead": move_behind_link,
        "deleted": lambda path: shutil.rmtree(path, ignore_errors=True),
        "a link to nothing": lambda path: (shutil.rmtree(path, ignore_errors=True), path.symlink_to("nowhere")),
    }
    for place in (newest, Path("checkpoints"), Path("stage_start"), Path("tokenizer"), Path("final")):
        for kind, damage in places.items():
            if place.name != "final" or kind not in ("deleted", "a link instead"):
                yield Case("halfway", f"{place}/", kind, at(place, damage))
    draft = newest.with_name(f".tmp-step-{HALFWAY + 1:08d}")
    yield Case("halfway", str(draft), "a file", at(draft, put_file))
    yield Case("halfway", str(draft), "a link out of the run", at(draft, link_to_treasure))
    yield Case("halfway", ".lock", "a folder", at(Path(".lock"), lambda path: (path.unlink(), path.mkdir())))
    name = newest.with_name(f"step-{HALFWAY + 1:08d}")
    yield Case("halfway", str(name), "a file", at(name, put_file))
    yield Case("halfway", str(name), "an empty folder", at(name, Path.mkdir))
    yield Case("halfway", str(name), "a link out of the run", at(name, link_to_treasure))
    yield Case("halfway", "base-* of a cycle", "flipped", lambda copy: flip(0.9)(next((copy / newest).glob("base-*"))))
    for kind, damage in (("truncated", FILE_DAMAGES["truncated"]), ("manifest deleted", None)):
        yield Case("halfway", "every checkpoint", kind, partial(damage_all, damage))


def damage_all(damage: Callable[[Path], None] | None, copy: Path) -> None:
    """Damage the trained parameters of every checkpoint, or delete every manifest."""
    for folder in (copy / "checkpoints").iterdir():
        if damage is None:
            (folder / "MANIFEST.json").unlink()
        else:
            damage(folder / "trained-00001.safetensors")


def at(file: Path, damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """`damage`, applied to `file` of the copy it is given."""
    return lambda copy: damage(copy / file)


def move_behind_link(path: Path) -> None:
    """The same folder, elsewhere, with a link to it at its place."""
    elsewhere = path.with_name(f"moved-{path.name}")
    path.rename(elsewhere)
    path.symlink_to(elsewhere.name)


def link_to_treasure(path: Path) -> None:
    """A link to a folder outside of the run that nobody may touch."""
    treasure = path.parents[2] / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("mine")
    path.symlink_to(treasure)


# --- one case


def attempt(case: Case, target: Target, copy: Path) -> Outcome:
    """Damage a copy of the target at `copy`, use it, and see what comes of it."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    run = copy / "run"
    copy_run(target.folder, run)
    case.apply(run)
    kind, said = classify(lambda: target.use(run), target.expected)
    if (copy / "treasure").exists() and not (copy / "treasure" / "gold").exists():
        kind, said = OTHER, "something outside of the run was removed"
    return Outcome(case, kind, said)


def classify(use: Callable[[], Any], expected: Any) -> tuple[str, str]:
    """What came of `use`, and the line that it ended with or warned with."""
    from relora.config import UserError

    try:
        result, warnings = quietly(use)
    except UserError as error:
        return REFUSED, "; ".join(error.problems)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return TRACEBACK, f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    weights, checkpoint, lines = result
    if (weights, checkpoint) != expected[:2]:
        return OTHER, "; ".join(warnings) or "other weights, without a word"
    lost = [line for line in expected[2] if line not in lines]
    if (lost or lines != expected[2]) and not any("metrics.jsonl" in warning for warning in warnings):
        return OTHER, f"{len(lost)} lines of metrics are lost without a word"
    return RECOVERED, "; ".join(warnings)


def quietly(use: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The result of `use` and the warnings of relora that it printed; nothing reaches the screen."""
    errors, mark = io.StringIO(), "relora: warning: "
    logged = logging.StreamHandler(errors)
    logged.setFormatter(logging.Formatter(f"{mark}%(message)s"))
    logging.getLogger("relora.data.prepared_folder").addHandler(logged)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            result = use()
    finally:
        logging.getLogger("relora.data.prepared_folder").removeHandler(logged)
    # The progress bar may stand on the same line.
    return result, [line.partition(mark)[2] for line in errors.getvalue().splitlines() if mark in line]


def train_again(tree: dict[str, Any], run: Path) -> Any:
    """Give the command again for the damaged copy, and return the result."""
    from relora.config import check
    from relora.train.train import train

    train(check(tree | {"output_dir": str(run)}))
    return result_of(run)


def export_again(run: Path) -> Any:
    """Export the run, and return the result: the weights, and the text that the tokenizer makes of some ids."""
    from transformers import AutoTokenizer

    from relora.commands.export import export
    from relora.files import sha256_of

    target = run.parent / "exported"
    shutil.rmtree(target, ignore_errors=True)
    export(str(run), str(target), dtype="float32", step=None)
    return sha256_of(target / "model.safetensors"), AutoTokenizer.from_pretrained(target).decode(range(20, 290)), []


def prepare_again(tree: dict[str, Any], folder: Path) -> Any:
    """Prepare the data of the run in `folder`, and return their hash and the tokens that come of them."""
    from relora.config import check
    from relora.data import prepare

    config = check(tree | {"data": tree["data"] | {"prepared_dir": str(folder)}})
    prepared = prepare(config.data, vocab_size=tree["model"]["config"]["vocab_size"], tokenizer=None, quiet=True)
    samples = prepared.samples(config.data, config.seed)
    tokens = [samples[i]["input_ids"].tolist() for i in range(4 * END)]
    return tokens, (prepared.manifest.content_hash, prepared.tokenizer().decode(range(20, 290))), []


def result_of(run: Path) -> tuple[str, dict[str, str], list[dict[str, Any]]]:
    """Hash of the final weights, hashes in the last checkpoint, metrics without costs."""
    from relora.files import sha256_of
    from tests.helpers.tiny import metrics

    manifest = json.loads((run / "checkpoints" / f"step-{END:08d}" / "MANIFEST.json").read_text())
    hashes = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    return sha256_of(run / "final" / "model.safetensors"), hashes, metrics(run)


# --- the section


def section(found: Sequence[Outcome], *, seconds: float) -> str:
    """The results as Markdown: one row for each file and damage, edits of fields counted together."""
    counts = Counter(outcome.kind for outcome in found)
    command = " ".join(["python -m benchmarks.reliability", *sys.argv[1:]])
    total = ", ".join(f"{counts[kind]} {kind}" for kind in (RECOVERED, REFUSED, TRACEBACK, OTHER))
    rows: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in found:
        target, file, damage = outcome.case.target, outcome.case.file, outcome.case.damage
        rows.setdefault((target, file, "a field edited" if ": " in damage else damage), []).append(outcome)
    lines = [
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "",
        f"`{command}`",
        "",
        f"{machine()}, {datetime.now(UTC):%Y-%m-%d}, {seconds:.0f} s",
        "",
        f"{len(found)} cases: {total}.",
        "",
        table([row(*key, group) for key, group in rows.items()]),
    ]
    bad = [outcome for outcome in found if outcome.kind in (TRACEBACK, OTHER)]
    lines += [f"- {each.case.file}, {each.case.damage}: {each.kind}: {each.said}" for each in bad]
    return "\n".join(lines)


def row(target: str, file: str, damage: str, group: Sequence[Outcome]) -> dict[str, Any]:
    """One row of the table."""
    kinds = Counter(outcome.kind for outcome in group)
    answers = Counter(outcome.said for outcome in group if outcome.said)
    answer = answers.most_common(1)[0][0] if answers else ""
    return {
        "run": target,
        "file": file,
        "damage": damage,
        **{kind: kinds[kind] for kind in (RECOVERED, REFUSED, TRACEBACK, OTHER)},
        "answer, such as": shortened(answer),
    }


def shortened(answer: str) -> str:
    """`answer` for a cell of the table: without the temporary folder, at most 160 characters."""
    words = [f"RUN{word.partition('/case/run')[2]}" if "/case/run" in word else word for word in answer.split()]
    text = " ".join(words).replace("|", "/")
    return text if len(text) <= 160 else f"{text[:157]}..."


if __name__ == "__main__":
    main()
