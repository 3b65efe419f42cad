"""What users get wrong: exit code 2, one clear line a mistake, before a model is built; and nothing on disk changes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pytest
from filelock import FileLock

import relora.checkpoint.weights
import relora.commands.load_model
import relora.train.stages
import relora.train.train
from benchmarks.mutations import MODEL
from relora.checkpoint.format import sealed
from relora.cli import main
from relora.config.yaml12 import dump, parse

WORDS = ["the", "of", "rank", "low", "high", "update", "merge", "train", "loss", "weight"]
SETTINGS: dict[str, Any] = {
    "output_dir": "new",
    "model": {"config": MODEL},
    "data": {
        "sources": [{"path": "text.jsonl"}],
        "sequence_length": 16,
        "eval_fraction": 0.2,
        "eval_tokens": 64,
        "num_proc": 1,
        "num_workers": 0,
    },
    "lora": {"r": 4},
    "relora": {"restart_every": None},
    "schedule": {"warmup_steps": 0, "restart_warmup_steps": 0},
    "training": {
        "max_steps": 2,
        "global_batch_size": 4,
        "per_device_batch_size": 2,
        "mixed_precision": "no",
        "eval_steps": 2,
        "save_steps": 1,
    },
}
PROJECTIONS = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
FSDP_1 = "FSDP: fsdp_version 1 cannot hold frozen and trained weights in one unit; set fsdp_version: 2"
LAUNCHES = "relora has one process, DDP, FSDP2 and DeepSpeed ZeRO; use one of the files in launch/"


@dataclass(frozen=True)
class Case:
    """`relora train c.yaml` with `overrides`, and the lines it ends with; <...> stands for anything."""

    overrides: list[str]
    lines: list[str]
    env: dict[str, str] = field(default_factory=dict)


def model(**changes: Any) -> str:
    return f"model.config={json.dumps(MODEL | changes)}"


def sources(*paths: str) -> str:
    return f"data.sources={json.dumps([{'path': path} for path in paths])}"


# --- a folder with a configuration, texts, things that look like models, and a finished run


def documents(path: Path, number: int, *, column: str = "text") -> None:
    draw = random.Random(path.name)
    texts = (f"{i} {' '.join(draw.choices(WORDS, k=draw.randint(5, 60)))}" for i in range(number))
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


def write_texts(home: Path) -> None:
    documents(home / "text.jsonl", 100)
    documents(home / "other.jsonl", 100)
    documents(home / "column.jsonl", 20, column="texts")
    documents(home / "one_document.jsonl", 1)
    documents(home / "few.jsonl", 10)
    (home / "empty.jsonl").write_text("")
    (home / "nulls.jsonl").write_text('{"text": null}\n' * 3)
    (home / "blank.jsonl").write_text('{"text": ""}\n' * 3)
    (home / "numbers.jsonl").write_text('{"text": 5}\n' * 3)
    (home / "text.xyz").write_text("words")
    for name in ("garbage.jsonl", "garbage.txt", "garbage.csv", "garbage.parquet", "garbage.jsonl.gz"):
        (home / name).write_bytes(bytes(range(256)) * 20)


def write_models(home: Path) -> None:
    for name, text in {"broken.json": '{"a"', "list.json": "[1]", "words.json": "{}"}.items():
        (home / name).write_text(text)
    for name in ("no_weights", "slow_tokenizer", "no_tokenizer", "nothing_in_it", "t5"):
        (home / name).mkdir()
    (home / "no_weights" / "config.json").write_text(json.dumps(MODEL))
    (home / "t5" / "config.json").write_text('{"model_type": "t5", "d_model": 16}')
    (home / "t5" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def write_tokenizers(home: Path) -> None:
    """Copies of the run's tokenizer: one that is larger than the model, one without an EOS, one that is slow only."""
    for name in ("large_tokenizer", "no_eos"):
        shutil.copytree(home / "run" / "tokenizer", home / name)
    path = home / "large_tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] += [dict(tokenizer["added_tokens"][0], id=300, content="low high", special=False)]
    path.write_text(json.dumps(tokenizer))
    path = home / "no_eos" / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (home / "slow_tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("RELORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        # The hub's client reads HF_HUB_OFFLINE when it is imported, which is over; asking in vain takes a minute.
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        write_texts(home)
        write_models(home)
        (home / "c.yaml").write_text(dump(SETTINGS))
        (home / "a_file").write_text("words")
        assert main(["train", "c.yaml", "output_dir=run"]) == 0
        write_tokenizers(home)
        yield home


@pytest.fixture
def home(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as the working folder; times of change are kept, so that its texts count as those prepared."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _no_model_is_built(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (home / "run" / "final").is_dir()  # the run that is there was made before the wires were laid

    def trip(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    for module, name in [
        (sys.modules["relora.train.train"], "build"),  # the function of this name hides the module
        (relora.checkpoint.weights, "build_model"),
        (relora.train.stages, "empty_model"),
        (relora.commands.load_model, "load_run_model"),
    ]:
        monkeypatch.setattr(module, name, trip)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_like(line: str, expected: str) -> bool:
    return re.fullmatch(".*".join(re.escape(part) for part in expected.split("<...>")), line) is not None


Fails = Callable[..., None]
STATUS = "run/status.json"


@pytest.fixture
def fails(home: Path, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command, which must end with exit code 2 and these lines, and leave alone what was there."""

    def run(arguments: list[str], lines: list[str]) -> None:
        before = contents(home)
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said
        problems = [line.removeprefix("relora: ") for line in said.splitlines() if line.startswith("relora: ")]
        assert len(problems) == len(lines), problems
        for problem, line in zip(problems, lines, strict=True):
            assert is_like(problem, line), f"{problem!r} is not {line!r}"
        after = contents(home)
        # A run that is tried again tells in status.json why it could not go on; nothing else is touched.
        if after.get(STATUS) != before.get(STATUS):
            assert json.loads(after[STATUS])["reason"].splitlines() == problems
        kept = before.keys() - {STATUS}
        assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}

    return run


# --- the configuration

CONFIG = {
    "restart_every shorter than the re-warm": Case(
        ["relora.restart_every=2", "schedule.restart_warmup_steps=3"],
        ["relora.restart_every = 2: must be at least schedule.restart_warmup_steps = 3"],
    ),
    "warm start beyond the end": Case(
        ["relora.warm_start_steps=2"],
        ["relora.warm_start_steps = 2: must be smaller than training.max_steps = 2, or there is no low-rank stage"],
    ),
    "warm-up as long as the run": Case(
        ["schedule.warmup_steps=2"], ["schedule.warmup_steps = 2: must be smaller than training.max_steps = 2"]
    ),
    "batch that does not divide": Case(
        ["training.global_batch_size=3"],
        ["training.global_batch_size = 3: must be a multiple of training.per_device_batch_size = 2"],
    ),
    "batch that does not divide over num_processes": Case(
        ["training.num_processes=3"],
        [
            "training.global_batch_size = 4: must be a multiple of training.per_device_batch_size x "
            "training.num_processes = 2 x 3 = 6"
        ],
    ),
    "fewer held-out tokens than a sample": Case(
        ["data.eval_tokens=15"], ["data.eval_tokens = 15: must hold at least one sample of data.sequence_length = 16"]
    ),
    "both a config and a pretrained model": Case(
        ["model.name_or_path=gpt2"],
        ["model.config, model.name_or_path: set exactly one (from scratch, or continual training); both are set"],
    ),
    "neither a config nor a pretrained model": Case(
        ["model.config=null"],
        ["model.config, model.name_or_path: set exactly one (from scratch, or continual training); neither is set"],
    ),
    "target_modules is no regular expression": Case(
        ["lora.target_modules='*_proj'"],
        ["lora.target_modules = *_proj: not a regular expression (nothing to repeat at position 0)"],
    ),
    "trainable with method relora": Case(
        ["training.trainable=attn"], ["training.trainable = attn: goes with training.method = full only"]
    ),
    "residual of exact weights": Case(
        ["relora.carry_residual=true"],
        ["relora.carry_residual = true: needs lora.base_dtype int8 or nf4, not float32"],
    ),
    "document mask with flash attention": Case(
        ["data.document_mask=true", "model.attn_implementation=flash_attention_2", "training.mixed_precision=bf16"],
        ["data.document_mask = true: needs model.attn_implementation eager or sdpa, not flash_attention_2"],
    ),
    "rank of zero": Case(["lora.r=0"], ["lora.r = 0: must be an integer >= 1"]),
    "number in quotes": Case(["optim.learning_rate='1e-3'"], ["optim.learning_rate = '1e-3': must be a number >= 0"]),
    "learning rate that is not finite": Case(
        ["optim.learning_rate=.inf"], ["optim.learning_rate = .inf: must be a number >= 0, and finite"]
    ),
    "unknown optimizer": Case(
        ["optim.name=adam"], ["optim.name = adam: must be adamw, adamw_fused, adamw_8bit, muon or module:attribute"]
    ),
    "peak of nothing": Case(["training.peak_tflops=0"], ["training.peak_tflops = 0: must be a number > 0 or null"]),
    "unknown reinit": Case(
        ["relora.reinit=kaimin"], ["relora.reinit = kaimin: must be kaiming, orthogonal, offset or module:attribute"]
    ),
    "misspelt key": Case(["lora.lora_alhpa=8"], ["lora.lora_alhpa = 8: unknown key; the nearest is lora.lora_alpha"]),
    "key of another section": Case(
        ["training.learning_rate=1"], ["training.learning_rate = 1: unknown key; the nearest is optim.learning_rate"]
    ),
    "misspelt key in a source": Case(
        ["data.sources=[{path: text.jsonl, wieght: 2}]"],
        ["data.sources[0].wieght = 2: unknown key; the nearest is data.sources[].weight"],
    ),
    "override without a value": Case(["lora.r"], ["lora.r: an override is written section.key=value"]),
    "override of no YAML": Case(["lora.r=["], ["lora.r=[: the value is not valid YAML"]),
    "override below a value": Case(["lora.r.x=1"], ["lora.r.x=1: lora.r = 4 is not a section"]),
    "all mistakes of a configuration": Case(
        ["lora.r=0", "data.sequence_length=1", "optim.lr=1", "schedule.warmup_steps=2", "training.trainable=("],
        [
            "data.sequence_length = 1: must be an integer >= 2",
            "lora.r = 0: must be an integer >= 1",
            "optim.lr = 1: unknown key; the nearest is optim.learning_rate",
            "schedule.warmup_steps = 2: must be smaller than training.max_steps = 2",
            "training.trainable = (: goes with training.method = full only",
        ],
    ),
}


@pytest.mark.parametrize("name", CONFIG)
def test_configuration(name: str, home: Path, fails: Fails) -> None:
    fails(["train", "c.yaml", *CONFIG[name].overrides], CONFIG[name].lines)
    assert not (home / "new").exists()


FILES = {
    "missing configuration file": (None, "c2.yaml: there is no such configuration file"),
    "configuration that is not YAML": ("output_dir: [", "c2.yaml: not valid YAML (<...>)"),
    "configuration with a key twice": (
        "seed: 1\nseed: 2",
        "c2.yaml: not valid YAML (these keys appear more than once: seed <...>)",
    ),
    "configuration that is no mapping": ("- seed", "c2.yaml: must be a mapping of sections, not [seed]"),
    "configuration that is empty": ("", "c2.yaml: must be a mapping of sections, not null"),
}


@pytest.mark.parametrize("name", FILES)
def test_configuration_file(name: str, home: Path, fails: Fails) -> None:
    text, line = FILES[name]
    if text is not None:
        (home / "c2.yaml").write_text(text)
    fails(["train", "c2.yaml"], [line])


# --- launch, files, run folder

SURROUNDINGS = {
    "batch that does not divide over the launch": Case(
        [],
        [
            "training.global_batch_size = 4: must be a multiple of training.per_device_batch_size x "
            "processes = 2 x 3 = 6"
        ],
        {"WORLD_SIZE": "3"},
    ),
    "num_processes other than the launch": Case(
        ["training.num_processes=2"], ["training.num_processes = 2: the launcher started 1"]
    ),
    "launch for FSDP": Case(
        [],
        [FSDP_1],
        {"ACCELERATE_USE_FSDP": "true"},
    ),
    "8-bit AdamW of sharded parameters": Case(
        ["optim.name=adamw_8bit"],
        ["optim.name = adamw_8bit: needs one process or DDP, in which every parameter is whole"],
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    ),
    "Muon of sharded parameters": Case(
        ["optim.name=muon", "relora.warm_start_steps=1"],
        ["optim.name = muon: needs one process or DDP, in which every matrix is whole"],
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    ),
    "launch for DeepSpeed": Case(
        [],
        [f"the launcher asks for Megatron-LM (ACCELERATE_USE_MEGATRON_LM=true): {LAUNCHES}"],
        {"ACCELERATE_USE_MEGATRON_LM": "true"},
    ),
    "missing source": Case(
        [sources("./txet.jsonl")],
        ["data.sources<...>0<...>path = <...>./txet.jsonl<...>: no such file or folder; nearest is 'text.jsonl'"],
    ),
    "glob without a match": Case(
        [sources("texts/*.txt")],
        ["data.sources<...>0<...>path = <...>texts/*.txt<...>: no file matches this pattern"],
    ),
    "unknown extension": Case(
        [sources("./text.xyz")],
        ["data.sources<...>0<...>path = <...>./text.xyz<...>: unknown extension of text.xyz; known are <...>"],
    ),
    "empty source": Case(
        [sources("empty.jsonl")],
        ["data.sources<...>0<...>path = <...>empty.jsonl<...>: empty: its files hold no bytes"],
    ),
    "split that is not there": Case(
        ["data.sources=[{path: text.jsonl, split: test}]"],
        ["data.sources<...>0<...>path = <...>text.jsonl<...>: split = 'test', but its files hold only ['train']"],
    ),
    "missing model config": Case(["model.config=nothing.json"], ["model.config = nothing.json: there is no such file"]),
    "model config that is not JSON": Case(
        ["model.config=broken.json"], ["model.config = broken.json: is not a readable JSON file (<...>)"]
    ),
    "model config that is a list": Case(
        ["model.config=list.json"], ["model.config = list.json: must hold a JSON mapping, not a list"]
    ),
    "model config without a type": Case(
        ["model.config=words.json"],
        ["model.config = words.json: needs model_type, the name of the architecture in transformers, such as llama"],
    ),
    "unknown model_type": Case(
        [model(model_type="lama")],
        ["model.config: model_type lama is unknown to transformers <...>; the nearest is llama"],
    ),
    "value of the wrong type in a model config": Case(
        [model(hidden_size="wide")],
        ["model.config: transformers refuses it for model_type llama: <...>'hidden_size'<...>int<...>'wide'<...>"],
    ),
    "heads that do not divide": Case(
        [model(num_attention_heads=3)],
        ["model.config: transformers refuses it for model_type llama: <...>hidden size (16)<...>heads (3)<...>"],
    ),
    "misspelt key in a model config": Case(
        [model(hiden_size=8)], ["model.config: unknown key hiden_size; the nearest is hidden_size"]
    ),
    "encoder-decoder without a causal model": Case(
        ["model.config={model_type: t5}"],
        ["model.config: model_type t5 has no causal language model in transformers"],
    ),
    "pretrained encoder-decoder": Case(
        ["model.config=null", "model.name_or_path=t5"],
        ["model.name_or_path = t5: model_type t5 has no causal language model in transformers"],
    ),
    "pretrained model that is not there": Case(
        ["model.config=null", "model.name_or_path=./nowhere"],
        ["model.name_or_path = ./nowhere: there is no such folder"],
    ),
    "pretrained model that is not on the hub": Case(
        ["model.config=null", "model.name_or_path=no/such-model"],
        ["model.name_or_path = no/such-model: no such folder here, and none can be loaded from the hub: <...>"],
    ),
    "pretrained folder without a model": Case(
        ["model.config=null", "model.name_or_path=nothing_in_it"],
        ["model.name_or_path = nothing_in_it: <...>Unrecognized model in nothing_in_it<...>"],
    ),
    "pretrained folder without weights": Case(
        ["model.config=null", "model.name_or_path=no_weights"],
        ["model.name_or_path = no_weights: the folder holds no weights (model.safetensors)"],
    ),
    "all mistakes of the surroundings": Case(
        [sources("./txet.jsonl", "empty.jsonl"), "model.config=nothing.json", "training.num_processes=1"],
        [
            FSDP_1,
            "training.num_processes = 1: the launcher started 3",
            "training.global_batch_size = 4: must be a multiple of <...> = 6",
            "data.sources<...>0<...>./txet.jsonl<...>: no such file or folder; nearest is 'text.jsonl'",
            "data.sources<...>1<...>empty.jsonl<...>: empty: its files hold no bytes",
            "model.config = nothing.json: there is no such file",
        ],
        {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "3"},
    ),
}

# --- what does not fit the model

BLOOM = "{model_type: bloom, hidden_size: 16, n_layer: 1, n_head: 2, vocab_size: 300}"
FALCON = "{model_type: falcon, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, alibi: true}"
MODELS = {
    "r larger than the layer": Case(
        ["lora.r=17"],
        [
            "lora.target_modules = 'all-linear' leaves no layer to wrap: model.layers.0.self_attn.q_proj has a smaller "
            "side of 16, less than r = 17 (and 6 more); lm_head is the output head"
        ],
    ),
    "sequence longer than the positions": Case(
        ["data.sequence_length=65", "data.eval_tokens=65"],
        ["data.sequence_length = 65: the model has max_position_embeddings = 64"],
    ),
    "target_modules that match nothing": Case(
        ["lora.target_modules=[query]"],
        [f"lora.target_modules = <...>query<...> matches no linear layer; candidates: {PROJECTIONS}"],
    ),
    "target_modules as a regex that matches nothing": Case(
        ["lora.target_modules=q_proj"],  # a regex is for the whole name
        [f"lora.target_modules = <...>q_proj<...> matches no linear layer; candidates: {PROJECTIONS}"],
    ),
    "modules_to_save that match nothing": Case(
        ["lora.modules_to_save=[head]"],
        ["lora.modules_to_save = ['head'] matches no module; candidates: <...>embed_tokens<...>lm_head<...>"],
    ),
    "tied head as a target": Case(
        [model(tie_word_embeddings=True), "lora.target_modules=[lm_head]"],
        [
            "lora.target_modules: lm_head is tied (model.embed_tokens.weight, lm_head.weight), "
            "and wrapping it would break the tie"
        ],
    ),
    "parameters that stay random": Case(
        ["lora.modules_to_save=null"],
        [
            "lora.modules_to_save = null: 5 parameters would stay at their random initialization: they are frozen, "
            "not wrapped and not pretrained: model.embed_tokens.weight, <...>"
        ],
    ),
    "parameters that stay random under method full": Case(
        ["training.method=full", "training.trainable=q_proj"],
        [
            "training.trainable = q_proj: 11 parameters would stay at their random initialization: they are frozen, "
            "not wrapped and not pretrained: model.embed_tokens.weight, <...>"
        ],
    ),
    "trainable that matches nothing": Case(
        ["training.method=full", "training.trainable=query"],
        ["training.trainable = query: matches no parameter name (names look like model.embed_tokens.weight)"],
    ),
    "attention kernel that is not installed": Case(
        ["model.attn_implementation=flash_attention_3", "training.mixed_precision=bf16"],
        ["model.attn_implementation = flash_attention_3: cannot be used here, eager can: <...>"],
    ),
    "attention kernel that the model has not": Case(
        [f"model.config={BLOOM}"],
        ["model.attn_implementation = sdpa: cannot be used here, eager can: <...>BloomForCausalLM<...>"],
    ),
    "document mask without positions": Case(
        [f"model.config={BLOOM}", "model.attn_implementation=eager", "data.document_mask=true"],
        ["data.document_mask = true: BloomForCausalLM takes no position_ids, from which the mask is made"],
    ),
    "document mask with alibi": Case(
        [f"model.config={FALCON}", "data.document_mask=true"],
        ["data.document_mask = true: FalconForCausalLM takes no position_ids, from which the mask is made"],
    ),
    "model that cannot be built": Case(
        [model(hidden_act="gleu")], ["model.config: transformers cannot build the model: KeyError: 'gleu'"]
    ),
    "all that does not fit the model": Case(
        [
            model(tie_word_embeddings=True),
            *("data.sequence_length=65", "data.eval_tokens=65", "lora.r=17"),
            *("lora.target_modules=[lm_head, q_proj]", "lora.modules_to_save=[head]"),
        ],
        [
            "data.sequence_length = 65: the model has max_position_embeddings = 64",
            "lora.modules_to_save = ['head'] matches no module; candidates: <...>",
            "lora.target_modules: model.layers.0.self_attn.q_proj has a smaller side of 16, less than r = 17",
            "lora.target_modules: lm_head is tied <...>",
        ],
    ),
}

# --- tokenizer and data

DATA = {
    "vocabulary smaller than the tokenizer's": Case(
        ["data.tokenizer=large_tokenizer"],
        [
            "data.sources[0].path = <...>: text in it becomes the token 'low high' of id 300; the model has "
            "embeddings for the ids below vocab_size = 300: raise model.config.vocab_size to 301, <...>"
        ],
    ),
    "vocabulary too small to train a tokenizer": Case(
        [model(vocab_size=256)], ["<...>vocab_size = 256: a byte-level BPE needs at least 257 <...>"]
    ),
    "tokenizer that is not there": Case(
        ["data.tokenizer=./nowhere"], ["data.tokenizer = <...>./nowhere<...>: there is no such folder"]
    ),
    "folder without a tokenizer": Case(
        ["data.tokenizer=no_tokenizer"],
        ["data.tokenizer = <...>no_tokenizer<...>: cannot be loaded as a tokenizer: <...>"],
    ),
    "tokenizer without an EOS": Case(
        ["data.tokenizer=no_eos"],
        ["data.tokenizer = <...>no_eos<...>: has no eos_token, which must end every document"],
    ),
    "slow tokenizer": Case(
        ["data.tokenizer=slow_tokenizer", model(vocab_size=400)],
        [
            "data.tokenizer = <...>slow_tokenizer<...>: a fast tokenizer (tokenizer.json) is required, "
            "this is ByT5Tokenizer"
        ],
    ),
    "source without the text field": Case(
        [sources("column.jsonl")],
        [
            "data.sources<...>0<...>column.jsonl<...>: data.text_field = 'text': it has only the columns ['texts']; "
            "nearest is 'texts'"
        ],
    ),
    "text field that holds numbers": Case(
        [sources("numbers.jsonl")],
        ["data.sources<...>0<...>numbers.jsonl<...>: data.text_field = 'text': it holds <...>int64<...>, not strings"],
    ),
    "source of nulls": Case(
        [sources("nulls.jsonl")],
        ["data.sources<...>0<...>path = <...>nulls.jsonl<...>: no documents (3 rows, all without a text)"],
    ),
    "source of empty texts": Case(
        [sources("blank.jsonl")],
        [
            "data.sources<...>0<...>(blank.jsonl): 0 training tokens, fewer than one row of "
            "data.sequence_length = 16; <...>",
            "data.eval_fraction = 0.2: 0 held-out tokens in 0 documents, fewer than one row of "
            "data.sequence_length = 16; <...>",
        ],
    ),
    **{
        f"binary garbage as {kind}": Case(
            [sources(f"garbage.{kind}")],
            [f"data.sources<...>0<...>path = <...>garbage.{kind}<...>: not readable as {reader}: <...>"],
        )
        for kind, reader in [
            *(("jsonl", "json"), ("txt", "text"), ("csv", "csv"), ("parquet", "parquet"), ("jsonl.gz", "json"))
        ]
    },
    "hub data set that cannot be reached": Case(
        ["data.sources=[{path: no/such-data}]"],
        ["data.sources<...>0<...>path = <...>no/such-data<...>: no such file or folder here, and the hub gave <...>"],
    ),
    "too little training text": Case(
        [sources("text.jsonl", "one_document.jsonl"), "data.sequence_length=64", "data.eval_fraction=0.9"],
        [
            "data.sources<...>1<...>(one_document.jsonl): 0 training tokens, fewer than one row of "
            "data.sequence_length = 64; add text, lower sequence_length, remove the source, or cut a long text into "
            "documents (data.document_characters)"
        ],
    ),
    "too little held-out text": Case(
        [sources("few.jsonl"), "data.eval_fraction=0.0001"],
        [
            "data.eval_fraction = 0.0001: 0 held-out tokens in 0 documents, fewer than one row of "
            "data.sequence_length = 16; raise eval_fraction, add documents, lower sequence_length, or cut long "
            "texts into documents (data.document_characters)"
        ],
    ),
    "prepared_dir that holds something else": Case(
        ["data.prepared_dir=run"],
        ["data.prepared_dir = <...>run<...>: holds other files and no manifest.json <...>; choose an empty folder"],
    ),
    "prepared_dir that is a file": Case(
        ["data.prepared_dir=a_file"], ["data.prepared_dir = <...>a_file<...>: not a folder to write to: <...>"]
    ),
    "all unreadable sources": Case(
        [sources("column.jsonl", "garbage.jsonl", "nulls.jsonl")],
        [
            "data.sources<...>0<...>column.jsonl<...>: data.text_field = 'text': it has only the columns <...>",
            "data.sources<...>1<...>path = <...>garbage.jsonl<...>: not readable as json: <...>",
            "data.sources<...>2<...>path = <...>nulls.jsonl<...>: no documents <...>",
        ],
    ),
}
AFTER_THE_CONFIGURATION = SURROUNDINGS | MODELS | DATA


@pytest.mark.parametrize("name", AFTER_THE_CONFIGURATION)
def test_surroundings_model_and_data(name: str, home: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    case = AFTER_THE_CONFIGURATION[name]
    for variable, value in case.env.items():
        monkeypatch.setenv(variable, value)
    fails(["train", "c.yaml", *case.overrides], case.lines)
    status = json.loads((home / "new" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 0)
    for reason, line in zip(status["reason"].splitlines(), case.lines, strict=True):
        assert is_like(reason, line)


@pytest.mark.parametrize("name", ["missing source", "unknown model_type", "slow tokenizer", "source of empty texts"])
def test_prepare_tells_the_same(name: str, fails: Fails) -> None:
    case = AFTER_THE_CONFIGURATION[name]
    fails(["prepare", "c.yaml", *case.overrides], case.lines)


def test_prepare_asks_for_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["prepare", "c.yaml", "training.num_processes=2"]) == 0


# --- the run folder


def test_run_folder_of_another_run_names_the_keys_that_differ(fails: Fails) -> None:
    other = "output_dir = run: holds another run: "
    changes = ["lora.r=2", "optim.learning_rate=0.5", sources("other.jsonl"), model(hidden_size=32)]
    fails(
        ["train", "c.yaml", "output_dir=run", *changes],
        [
            f"{other}data.sources is <...>text.jsonl<...> there and <...>other.jsonl<...> here",
            f"{other}lora.r is 4 there and 2 here",
            f"{other}model.config.head_dim is 8 there and 16 here",
            f"{other}model.config.hidden_size is 16 there and 32 here",
            f"{other}optim.learning_rate is 0.001 there and 0.5 here",
        ],
    )


def test_longer_run_suggests_extend(fails: Fails) -> None:
    line = "output_dir = run: holds another run: training.max_steps is 2 there and 3 here; --extend resumes <...>"
    fails(["train", "c.yaml", "output_dir=run", "training.max_steps=3"], [line])


def test_shorter_run_is_another_one_even_with_extend(fails: Fails) -> None:
    line = "output_dir = run: holds another run: training.max_steps is 2 there and 1 here"
    fails(["train", "c.yaml", "--extend", "output_dir=run", "training.max_steps=1"], [line])


def test_output_dir_is_a_file(fails: Fails) -> None:
    fails(["train", "c.yaml", "output_dir=a_file"], ["output_dir = a_file: is a file"])


def test_output_dir_below_a_file(fails: Fails) -> None:
    line = "output_dir = a_file/run: <...>a_file is a file, not a folder"
    fails(["train", "c.yaml", "output_dir=a_file/run"], [line])


def test_prepare_for_an_output_dir_below_a_file(fails: Fails) -> None:
    line = "output_dir = a_file/run: <...>a_file is a file, not a folder"
    fails(["prepare", "c.yaml", "output_dir=a_file/run"], [line])


def test_run_folder_in_use(home: Path, fails: Fails) -> None:
    with FileLock(home / "run" / ".lock"):
        line = "output_dir = run: another process is training in it"
        fails(["train", "c.yaml", "output_dir=run"], [line])


def test_data_changed_under_a_run(home: Path, fails: Fails) -> None:
    with (home / "text.jsonl").open("a") as file:
        file.write('{"text": "one more document"}\n')
    line = "output_dir = run: was trained on data of hash <...>, these have <...>; the sources have changed<...>"
    fails(["train", "c.yaml", "output_dir=run"], [line])


CHECKPOINT = Path("run/checkpoints/step-00000002")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _change_manifest(**facts: Any) -> None:
    path = CHECKPOINT / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


DAMAGE: dict[str, tuple[Callable[[], Any], str]] = {
    "truncated safetensors": (
        lambda: os.truncate(CHECKPOINT / "trained-00001.safetensors", 50),
        "trained-00001.safetensors is not what was written (size or hash differs)",
    ),
    "flipped byte": (
        lambda: _flip(CHECKPOINT / "moments-00001.safetensors"),
        "moments-00001.safetensors is not what was written (size or hash differs)",
    ),
    "missing file": (
        lambda: (CHECKPOINT / "base-00000-00001.safetensors").unlink(),
        "base-00000-00001.safetensors is missing",
    ),
    "garbage in MANIFEST.json": (
        lambda: (CHECKPOINT / "MANIFEST.json").write_text('{"format'),
        "MANIFEST.json is damaged (<...>)",
    ),
    "bytes in MANIFEST.json": (
        lambda: (CHECKPOINT / "MANIFEST.json").write_bytes(b"\xff\x00"),
        "MANIFEST.json is damaged (<...>)",
    ),
    "keys missing in MANIFEST.json": (
        lambda: (CHECKPOINT / "MANIFEST.json").write_text('{"format": 2}'),
        "MANIFEST.json is damaged (files: Field required)",
    ),
    "another value in MANIFEST.json": (
        lambda: _change_manifest(step=6),
        "MANIFEST.json is damaged (its hash differs)",
    ),
}
OTHER_FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown format": ({"format": 7}, "checkpoint format 7, this version reads 3"),
    "format of the first version": (
        {"format": 1, "stage": "relora", "samples_seen": 8},
        "checkpoint format 1, written by relora 0.1; finish or export the run with relora 0.1, or start anew from its "
        "final model with model.name_or_path",
    ),
}
READERS = {
    "eval": ["eval", "run"],
    "export": ["export", "run", "--output", "exported"],
    "generate": ["generate", "run", "--prompt", "the"],
}


def test_damaged_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Path("run/metrics.jsonl")
    metrics.write_text('{"step": 1}\n{\n')
    assert main(["train", "c.yaml", "output_dir=run"]) == 0
    assert "run/metrics.jsonl is not what was written" in capsys.readouterr().err
    assert Path("run/metrics.damaged.jsonl").read_text() == "{\n"


def test_damaged_results_are_written_again(home: Path) -> None:
    Path("run/final/relora.json").write_text("{")
    assert main(["train", "c.yaml", "output_dir=run"]) == 0
    assert json.loads((home / "run/final/relora.json").read_text())["step"] == 2


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("command", ["train", *READERS])
def test_a_damaged_checkpoint(name: str, command: str, home: Path, fails: Fails) -> None:
    damage, reason = DAMAGE[name]
    damage()
    if command == "train":
        line = f"output_dir = run: damaged: {CHECKPOINT.name}: {reason}; without --strict the run resumes from the one "
        fails(["train", "c.yaml", "output_dir=run", "--strict"], [f"{line}before"])
    else:
        fails(READERS[command], [f"checkpoint {CHECKPOINT}: {reason}"])
    assert not (home / "exported").exists()


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("command", ["train", *READERS])
def test_a_checkpoint_of_another_format(name: str, command: str, fails: Fails) -> None:
    facts, line = OTHER_FORMATS[name]
    path = CHECKPOINT / "MANIFEST.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | facts)))
    arguments = ["train", "c.yaml", "output_dir=run"] if command == "train" else READERS[command]
    fails(arguments, [f"{CHECKPOINT}: {line}"])


@pytest.mark.parametrize("command", READERS)
def test_a_damaged_configuration_of_a_run(command: str, fails: Fails) -> None:
    Path("run/config.yaml").write_text("a: [b")
    fails(READERS[command], ["run/config.yaml: <...>while parsing a flow sequence<...>"])


# --- eval, export, generate

NO_MODEL = "neither a run folder nor a model that transformers can load"
NO_HUB = "neither a run folder nor a model that transformers can load (there is no such folder; <...>)"
COMMANDS = {
    "eval of a model without a run": (
        ["eval", "no_weights"],
        ["no_weights: belongs to no run; --config CONFIG.yaml says what to evaluate on"],
    ),
    "eval of nothing": (["eval", "nowhere", "--config", "c.yaml"], [f"nowhere: {NO_HUB}"]),
    "eval by a missing configuration": (
        ["eval", "run", "--config", "c2.yaml"],
        ["c2.yaml: there is no such configuration file"],
    ),
    "export of what is no run": (
        ["export", "no_weights", "--output", "x"],
        ["no_weights: is not a run folder (it has no config.yaml)"],
    ),
    "export to a folder that exists": (
        ["export", "run", "--output", "no_weights"],
        ["--output no_weights: exists already; nothing is overwritten"],
    ),
    "export below a file": (
        ["export", "run", "--output", "a_file/x"],
        ["--output a_file/x: <...>a_file is a file, not a folder"],
    ),
    "export of a step without a checkpoint": (
        ["export", "run", "--output", "x", "--step", "7"],
        ["--step 7: the run has checkpoints at 1, 2"],
    ),
    "generate from nowhere": (["generate", "nowhere", "--prompt", "a"], [f"nowhere: {NO_HUB}"]),
    "generate from a file": (["generate", "c.yaml", "--prompt", "a"], ["c.yaml: is not a folder"]),
    "generate from a path": (["generate", "./nowhere", "--prompt", "a"], ["./nowhere: there is no such folder"]),
    "generate from a folder without weights": (
        ["generate", "no_weights", "--prompt", "a"],
        ["no_weights: the folder holds no weights (model.safetensors)"],
    ),
    "report of what are no runs": (
        ["report", "run", "nowhere", "no_weights"],
        [f"{name}: is not a run folder with metrics" for name in ("nowhere", "no_weights")],
    ),
    "report below a file": (
        ["report", "run", "--output", "a_file/x"],
        ["--output a_file/x: <...>a_file is a file, not a folder"],
    ),
    "generate with impossible numbers": (
        ["generate", "run", "--prompt", "a", "--max-new-tokens", "0", "--temperature", "-1"],
        ["--max-new-tokens 0: must be >= 1", "--temperature -1.0: must be >= 0, and finite"],
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, fails: Fails) -> None:
    fails(*COMMANDS[name])


def test_run_without_a_checkpoint(home: Path, fails: Fails) -> None:
    shutil.rmtree(home / "run" / "checkpoints")
    for command in (["eval", "run"], ["export", "run", "--output", "x"], ["generate", "run", "--prompt", "a"]):
        fails(command, ["run: the run has no complete checkpoint yet"])


# --- the process


def relora_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "relora", *arguments], capture_output=True, text=True, timeout=60)


def test_process_ends_with_2_after_mistakes_in_the_configuration() -> None:
    done = relora_process("train", "c.yaml", "lora.r=0", "optim.lr=1", "schedule.warmup_steps=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "relora: lora.r = 0: must be an integer >= 1",
        "relora: optim.lr = 1: unknown key; the nearest is optim.learning_rate",
        "relora: schedule.warmup_steps = 2: must be smaller than training.max_steps = 2",
    ]


def test_process_ends_with_2_after_mistakes_about_the_model() -> None:
    done = relora_process("train", "c.yaml", "lora.r=17")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"relora: {MODELS['r larger than the layer'].lines[0]}"]


@pytest.mark.parametrize("arguments", [[], ["trian", "c.yaml"], ["train"], ["export", "run"], ["train", "--lora.r=5"]])
def test_command_line_that_is_none(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 2
    assert "usage: relora" in capsys.readouterr().err


def test_there_are_cases_enough_and_the_finished_run_goes_on(home: Path) -> None:
    named = [*CONFIG, *FILES, *AFTER_THE_CONFIGURATION, *DAMAGE, *COMMANDS]
    assert len(named) == len(set(named)) >= 90
    # The folder itself is in order: the same commands succeed where nothing is wrong.
    assert main(["train", "c.yaml", "output_dir=run"]) == 0
    assert main(["prepare", "c.yaml"]) == 0
    assert parse((home / "run" / "config.yaml").read_text())["lora"]["r"] == 4
