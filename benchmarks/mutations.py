"""Mutated inputs: configurations, overrides, and every JSON file that is read; each is used or refused in a line.

    python -m benchmarks.mutations --number 10000 --json mutations.json

Input number i of a seed is always the same one: `--first i --number 1` repeats it. A traceback, an exit code other than
0 and 2, and more than 2 s of computing are failures; the command ends with 1 if there is any.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import machine, write_section

LIMIT_S, HANG_S = 2.0, 60  # of the processor, and by the clock: other programs may have the processor meanwhile
GIB = 2**30
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
SETTINGS: dict[str, Any] = {
    "output_dir": "new",
    "seed": 1,
    "model": {"config": MODEL},
    "data": {"sources": [{"path": "text.jsonl"}], "sequence_length": 16, "eval_fraction": 0.2, "eval_tokens": 64}
    | {"num_proc": 1, "num_workers": 0},
    "lora": {"r": 4, "target_modules": "all-linear"},
    "relora": {"restart_every": None},
    "optim": {"learning_rate": 0.001},
    "schedule": {"warmup_steps": 0, "restart_warmup_steps": 0},
    "training": {"max_steps": 2, "global_batch_size": 4, "per_device_batch_size": 2, "mixed_precision": "no"},
}
# Everything that is checked before a run, and no run: data are not prepared where a file is in the way.
CHECK = ["train", "c.yaml", "data.prepared_dir=a_file"]
MODEL_TYPES = ["llama", "gpt2", "mistral", "qwen2", "gpt_neox", "opt", "bloom", "mamba", "t5", "bert", "lama", "", 5]
MODEL_KEYS = [
    *MODEL,
    *("dtype", "torch_dtype", "quantization_config", "attn_implementation", "_attn_implementation", "auto_map"),
    *("rope_parameters", "rope_scaling", "rope_theta", "head_dim", "num_key_value_heads", "hidden_act", "layer_types"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "rms_norm_eps", "initializer_range"),
    *("use_cache", "architectures", "text_config", "n_layer", "n_embd", "n_head", "sliding_window", "num_labels"),
    *("id2label", "problem_type", "_name_or_path", "transformers_version", "attention_bias", "pretraining_tp"),
    *("output_hidden_states", "chunk_size_feed_forward", "is_decoder", "tokenizer_class", "sep_token_id"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 7, -1, 2**31, 2**31 - 1, 2**63 - 1, 10**30, 0.5, -0.5, 1e308, 1e-320),
    *(
        "",
        "x",
        "float32",
        "float99",
        "auto",
        "eager",
        "sdpa",
        "llama",
        "0",
        "a:b",
        "os:getcwd",
        "a b",
        "é",
        "\U0001f600",
    ),
    *(
        "x" * 300,
        "x/" * 3000,
        "(",
        "a,b",
        "~nobody/x",
        "~",
        "$UNSET_VARIABLE/x",
        "./none",
        "\x7f",
        "%s{}",
        "-1",
        "null",
    ),
    *("\0", "\ud800", [], {}, [1], ["a"], [None], {"a": 1}, {"a": {"b": []}}, [[1, 2], [3]], ["q_proj", 5]),
    *({"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"rope_type": "yarn"}, {"": ""}),
    *({"rope_type": "linear", "factor": "x"}, {"type": 5}, {"AutoModelForCausalLM": "none.Model"}, [2**31] * 3),
]
NINE, NEXT = ", ".join(["*%s"] * 9), list(zip("abcdefg", "bcdefgh", strict=True))
TEXTS = [
    *("", "null", "~", "1e309", ".inf", "-.inf", ".nan", "9" * 5000, "0x" + "f" * 300, "0o777", "1_000", "2024-01-01"),
    *("!!bool text", "!!int x", "!!float x", "!!timestamp x", "!!binary x", "!!binary aGk=", "!!set {a}", "!!omap [1]"),
    *("!!python/object:os.system x", "!!pairs [[1]]", "&a [*a]", "&a {b: *a}", "&a {<<: *a}", "{<<: 5}", "*b", "!!str"),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x"',
        "[" * 100 + "]" * 100,
        "{a: " * 90 + "1" + "}" * 90,
        "[",
        "}",
        "'",
        '"',
        "|",
        ">-",
    ),
    *("? [a]\n: b", "a: b: c", "%TAG x", "--- 1\n--- 2", "- a", "\t", "@", "`", "# x", "=", "<<", "[*a, *b]", "\x07"),
    "[" + ", ".join(["1"] * 2000) + "]",
    # Each alias stands for nine of the one before; merged, and not.
    f"[&a [x,x,x,x,x,x,x,x,x], {', '.join(f'&{n} [{NINE % ((m,) * 9)}]' for m, n in NEXT)}]",
    f"[&a {{k: 1}}, {', '.join(f'&{n} {{<<: [{NINE % ((m,) * 9)}]}}' for m, n in NEXT)}]",
]


@dataclass(frozen=True)
class Case:
    """One mutated input: its kind, the command that meets it, and what was changed."""

    kind: str
    command: list[str]
    change: str


class Mutator:
    """Writes mutated inputs to the working folder, which holds `text.jsonl` and, in `whole`, what is mutated."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def case(self) -> Case:
        """Write one mutated input."""
        kinds: list[tuple[Callable[[], Case], int]] = [
            *((self.config, 4), (self.text_of_config, 2), (self.override, 5), (self.model, 6)),
            *((self.tokenizer, 2), (self.prepared, 2)),
        ]
        [kind] = self.draw.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
        return kind()

    def config(self) -> Case:
        """A configuration with some values replaced, keys added or left out."""
        tree = json.loads(json.dumps(SETTINGS))
        change = "; ".join(self.change(tree) for _ in range(self.draw.choice([1, 1, 1, 2, 3])))
        # JSON is YAML, and can write what a YAML writer refuses.
        Path("c.yaml").write_text(json.dumps(tree))
        return Case("config", CHECK, change)

    def text_of_config(self) -> Case:
        """The text of a configuration, damaged."""
        text = (Path("whole") / "c.yaml").read_bytes()
        damaged, change = self.damage(text)
        Path("c.yaml").write_bytes(damaged)
        return Case("text of config", CHECK, change)

    def override(self) -> Case:
        """One to three overrides with values of any form."""
        keys = [
            *(name.replace("[]", ".0") for name in known_keys()),
            "extends",
            "derived",
            "model",
            "data",
            "lora",
            "x.y",
        ]
        shutil.copy(Path("whole") / "c.yaml", "c.yaml")
        words = []
        for _ in range(self.draw.choice([1, 1, 2, 3])):
            value = self.draw.choice([*TEXTS, *map(str, VALUES)])
            words.append(f"{self.draw.choice(keys)}{self.draw.choice(['=', '=', '=', '=', ''])}{value}")
        words = [word if not word.startswith("-") else f" {word}" for word in words]
        is_of_a_model = any(word.strip().startswith(("model", "data.seq", "extends")) for word in words)
        command = CHECK if is_of_a_model or self.draw.random() < 0.7 else ["plan", "c.yaml"]
        return Case("override", [*command, *words], " ".join(words)[:300])

    def model(self) -> Case:
        """The JSON file of a model's config: values replaced, or its text damaged."""
        tree = dict(MODEL)
        if self.draw.random() < 0.2:
            text, change = self.damage(json.dumps(tree, indent=1).encode())
            Path("model.json").write_bytes(text)
        else:
            changes = {
                self.draw.choice(MODEL_KEYS): self.draw.choice(VALUES) for _ in range(self.draw.choice([1, 1, 2]))
            }
            if self.draw.random() < 0.3:
                changes["model_type"] = self.draw.choice(MODEL_TYPES)
            Path("model.json").write_text(json.dumps(tree | changes))
            change = repr(changes)
        shutil.copy(Path("whole") / "c.yaml", "c.yaml")
        return Case("model config", [*CHECK, "model.config=model.json"], change)

    def tokenizer(self) -> Case:
        """A JSON file of the tokenizer, mutated."""
        restore("tokenizer")
        names = sorted(path.name for path in Path("tokenizer").glob("*.json"))
        change = self.mutate_file(Path("tokenizer") / self.draw.choice(names))
        shutil.copy(Path("whole") / "c.yaml", "c.yaml")
        return Case("tokenizer", ["prepare", "c.yaml", "data.tokenizer=./tokenizer"], change)

    def prepared(self) -> Case:
        """The manifest of prepared data, or of unfinished ones, mutated."""
        restore("prepared")
        manifest = Path("prepared") / "manifest.json"
        if self.draw.random() < 0.3:
            made_from = json.loads(manifest.read_text())["made_from"]
            manifest.unlink()
            manifest = Path("prepared") / "unfinished.json"
            manifest.write_text(json.dumps({"made_from": made_from, "num_pieces": [1]}))
        change = self.mutate_file(manifest)
        shutil.copy(Path("whole") / "c.yaml", "c.yaml")
        return Case("prepared data", ["prepare", "c.yaml", "data.prepared_dir=prepared"], change)

    def mutate_file(self, path: Path) -> str:
        """Change values of a JSON file, or damage its text; returns what was done."""
        if self.draw.random() < 0.3:
            text, change = self.damage(path.read_bytes())
            path.write_bytes(text)
        else:
            tree = json.loads(path.read_text())
            change = self.change(tree)
            path.write_text(json.dumps(tree))
        return f"{path}: {change}"

    def change(self, tree: Any) -> str:
        """Replace, leave out or add one value anywhere in `tree`."""
        place, key = self.draw.choice(list(places(tree)))
        action = self.draw.choice(["replace", "replace", "replace", "remove", "add"])
        value = self.draw.choice(VALUES)
        if action == "add" and isinstance(place, dict):
            key = self.draw.choice(["x", "", "r", "path", "é", *place])
        if action == "remove":
            del place[key]
        else:
            place[key] = value
        return f"{action} {key!r} {value!r}"[:300]

    def damage(self, text: bytes) -> tuple[bytes, str]:
        """Bytes flipped, cut, inserted, doubled, or a value put in from TEXTS."""
        at, to = sorted((self.draw.randrange(len(text) + 1), self.draw.randrange(len(text) + 1)))
        word = self.draw.choice(TEXTS).encode("utf-8", "surrogatepass")
        noise = self.draw.randbytes(self.draw.choice([1, 2, 8]))
        change, new = self.draw.choice(
            [
                ("cut", text[:at] + text[to:]),
                ("end", text[:at]),
                ("double", text[:to] + text[at:]),
                ("noise", text[:at] + noise + text[at + len(noise) :]),
                ("insert", text[:at] + word + text[at:]),
                ("nest", b"[" * 3000 + text),
                ("value", text.replace(b": ", b": " + word + b" #", 1)),
            ]
        )
        return new, f"{change} {at}:{to} {word[:60]!r} {noise!r}"


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `tree` with each of its keys."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        yield tree, key
        if len(items) < 100:  # of a vocabulary, the entries alone
            yield from places(value)


def known_keys() -> list[str]:
    from relora.config.reference import fields

    return [name for name, _ in fields()]


def restore(name: str) -> None:
    """Copy `whole/NAME` anew."""
    shutil.rmtree(name, ignore_errors=True)
    shutil.copytree(Path("whole") / name, name)


def furnish() -> None:
    """Texts, a configuration, and the tokenizer and prepared data that it gives, in the working folder."""
    from relora.cli import main
    from relora.config.yaml12 import dump

    words = ["the", "of", "rank", "low", "high", "update", "merge", "train", "loss", "weight"]
    draw = random.Random(0)
    texts = (f"{i} {' '.join(draw.choices(words, k=draw.randint(5, 60)))}" for i in range(100))
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("a_file").write_text("")
    Path("whole").mkdir()
    (Path("whole") / "c.yaml").write_text(dump(SETTINGS))
    assert main(["prepare", "whole/c.yaml", "data.prepared_dir=whole/prepared"]) == 0
    shutil.copytree("whole/prepared/tokenizer", "whole/tokenizer")


def failure_of(case: Case) -> tuple[str | None, float]:
    """What is wrong with the end of a command, None if nothing is; and the seconds that it computed."""
    from relora.cli import main

    begin, printed = time.process_time(), io.StringIO()
    signal.alarm(HANG_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            code = main(case.command)
        failure = None if code in (0, 2) and "Traceback" not in printed.getvalue() else f"exit code {code}"
        if code == 2 and not any(line.startswith("relora: ") for line in printed.getvalue().splitlines()):
            failure = "no line"
    except SystemExit as ending:
        failure = None if ending.code == 2 else f"exit code {ending.code}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/relora/" in frame.filename]
        failure = (
            f"{type(error).__name__}: {str(error)[:200]} at {ours[-1].filename.split('/relora/')[-1]}:{ours[-1].lineno}"
        )
    finally:
        signal.alarm(0)
    return failure, time.process_time() - begin


def mutations(first: int, number: int, *, seed: int = 0) -> Iterator[tuple[int, Case, str | None, float]]:
    """Run inputs `first`, `first + 1`, ... in the working folder, which `furnish` has furnished."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"hangs for more than {HANG_S} s")

    before = signal.signal(signal.SIGALRM, hangs)
    try:
        for index in range(first, first + number):
            case = Mutator(seed * 10**9 + index).case()
            yield index, case, *failure_of(case)
    finally:
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=1000, help="number of inputs (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="write a section there, such as docs/results/reliability.md")
    parser.add_argument("--json", help="write the counts and the failures to this file")
    options = parser.parse_args()
    page = None if options.write is None else options.write.absolute()
    json_path = None if options.json is None else Path(options.json).absolute()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    resource.setrlimit(resource.RLIMIT_AS, (24 * GIB, 24 * GIB))  # a table of 2^31 rows is an error, not a dead machine
    counts: Counter[str] = Counter()
    failures, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RELORA_CACHE": f"{folder}/cache", "HOME": f"{folder}/home"}
        (Path(folder) / "home").mkdir()  # "~" is a source too
        os.chdir(folder)
        furnish()
        for index, case, failure, seconds in mutations(options.first, options.number, seed=options.seed):
            counts[case.kind] += 1
            slowest = max(slowest, seconds)
            if failure is None and seconds > LIMIT_S:
                failure = f"took {seconds:.1f} s"
            if failure is not None:
                failures.append({"index": index, "kind": case.kind, "change": case.change, "failure": failure})
                print(f"{index} {case.kind} {case.command}: {case.change}\n    {failure}", file=sys.stderr, flush=True)
        os.chdir("/")
    result = {"number": options.number, "kinds": dict(counts), "slowest_s": round(slowest, 2), "failures": failures}
    kinds = ", ".join(f"{count:,} of {kind}" for kind, count in sorted(counts.items()))
    text = f"{options.number:,} mutated inputs ({kinds}): {len(failures)} failures, the slowest took {slowest:.2f} s."
    print(text)
    if page is not None:
        command = " ".join(["python -m benchmarks.mutations", *sys.argv[1:]])
        told = f"{(__doc__ or '').split(chr(10) * 2)[2]}\n\n`{command}`\n\n{machine()}\n\n{text}"
        write_section(page, "Mutated inputs", told)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
