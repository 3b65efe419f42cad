"""Every key of the configuration, broken in every way that its rule allows; and every rule that joins keys."""

import copy
import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from relora.config import Config, LoraSection, UserError, check, load_config
from relora.config.derived import accumulation_steps, derived_numbers, fingerprint, identity, lora_config, schedule_of
from relora.config.load import shown
from relora.config.reference import fields, markdown, rule
from relora.config.rules import RULES
from relora.config.yaml12 import dump, parse
from relora.method.lora import LoRAConfig

ROOT = Path(__file__).resolve().parents[2]
FIELDS = dict(fields())
SECTIONS = ("model", "data", "lora", "relora", "optim", "schedule", "training")
BASE: dict[str, Any] = {"output_dir": "runs/x", "model": {"config": "model.json"}}
OF_ANY_KIND = [
    *("", "nonsense", "5", "true", 5, -3, 0, 2.5, -0.5, True, False, None, math.nan, math.inf, -math.inf),
    *([], ["a"], [""], [5], {}, {"a": 1}),
]
# The keys of which DESIGN.md says that another value is the same run, computed otherwise.
NOT_PART_OF_THE_RUN = {
    *("lora.forward", "lora.keep_merged", "lora.master"),
    "output_dir",
    *("model.attn_implementation", "model.gradient_checkpointing", "model.torch_compile", "model.liger_kernel"),
    *("data.prepared_dir", "data.num_proc", "data.num_workers"),
    *("training.per_device_batch_size", "training.per_device_eval_batch_size", "training.mixed_precision"),
    *("training.num_processes", "training.eval_steps", "training.save_steps", "training.save_total_limit"),
    *("training.logging_steps", "training.probe_steps", "training.sync_each_batch"),
    "training.peak_tflops",
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict) and key in SECTIONS
        result[key] = merged(result[key], value) if nested else value
    return result


def settings(key: str, value: Any) -> dict[str, Any]:
    """A mapping that is right but for `key`, perhaps; keys of sources are set in the second of two."""
    if key.startswith("data.sources[]."):
        name = key.removeprefix("data.sources[].")
        return merged(BASE, {"data": {"sources": [{"path": "a"}, {"path": "b"} | {name: value}]}})
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return merged(BASE, value)


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.replace("[]", ".1").split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def problems_of(mapping: dict[str, Any]) -> list[str]:
    try:
        check(mapping)
    except UserError as error:
        return error.problems
    return []


def problems_of_file(path: Path, text: str, *overrides: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    try:
        load_config(path, overrides)
    except UserError as error:
        return error.problems
    return []


# --- what a rule allows, said a second time, value by value


def allows(kind: Any, metadata: list[Any], value: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return allows(args[0], [*metadata, *inner], value)
    if origin in (Union, types.UnionType):
        return any(allows(arg, metadata, value) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        right = isinstance(value, list) and len(value) >= limit(metadata, "min_length", 0)
        return right and all(allows(args[0], [], item) for item in value)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return False  # no candidate here is a source
    types_allowed = {float: (int, float), types.NoneType: (types.NoneType,)}.get(kind, (origin or kind,))
    return type(value) in types_allowed and in_bounds(metadata, value)


def in_bounds(metadata: list[Any], value: Any) -> bool:
    if isinstance(value, str):
        return len(value) >= limit(metadata, "min_length", 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return (
        math.isfinite(value)
        and limit(metadata, "ge", -math.inf) <= value <= limit(metadata, "le", math.inf)
        and limit(metadata, "gt", -math.inf) < value < limit(metadata, "lt", math.inf)
    )


def limit(metadata: list[Any], name: str, default: float) -> float:
    found = [value for item in metadata if (value := getattr(item, name, None)) is not None]
    return found[-1] if found else default


def parts(kind: Any, metadata: list[Any]) -> list[tuple[Any, list[Any]]]:
    """The alternatives of a type without their annotations, each with its bounds."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [item for extra in args[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return parts(args[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return [part for arg in args for part in parts(arg, metadata)]
    return [(kind, metadata)]


def around_the_bounds(kind: Any, metadata: list[Any]) -> list[Any]:
    """Each bound, and its nearest neighbours on both sides; near misses of names."""
    if get_origin(kind) is Literal:
        names = get_args(kind)
        return [*names, *(f"{name}s" for name in names), *(name.upper() for name in names), *(n[:-1] for n in names)]
    bounds = [value for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)
              for value in [getattr(item, name)]]  # fmt: skip
    if kind is int:
        return [bound + step for bound in bounds for step in (-1, 0, 1)]
    return [v for bound in bounds for v in (math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf))]


def candidates(field: FieldInfo) -> list[Any]:
    near = [value for part in parts(field.annotation, field.metadata) for value in around_the_bounds(*part)]
    return [*OF_ANY_KIND, *near]


def wrong_values(key: str) -> list[Any]:
    field = FIELDS[key]
    wrong = [value for value in candidates(field) if not allows(field.annotation, field.metadata, value)]
    # What is wrong with an entry is told of the entry: test_entries_of_sources.
    return [v for v in wrong if not (key == "data.sources" and isinstance(v, list) and v)]


def right_values(key: str) -> list[Any]:
    field = FIELDS[key]
    if key == "data.sources":
        return [[{"path": "python-stdlib"}], [{"path": "x", "weight": 2.0}]]
    return [value for value in candidates(field) if allows(field.annotation, field.metadata, value)]


# --- the walk


def test_the_walk_reaches_every_key_and_every_kind_of_rule() -> None:
    assert len(FIELDS) > 50
    assert sum(len(wrong_values(key)) for key in FIELDS) > 800
    assert all(wrong_values(key) and right_values(key) for key in FIELDS)
    for key, field in FIELDS.items():
        for kind, metadata in parts(field.annotation, field.metadata):
            if kind in (int, float) and key != "data.sources[].weight":
                assert any(hasattr(m, name) for m in metadata for name in ("ge", "gt")), f"{key} has no lower bound"


@pytest.mark.parametrize("key", FIELDS)
def test_each_wrong_value_gives_one_line_with_key_value_and_rule(key: str) -> None:
    for value in wrong_values(key):
        not_finite = isinstance(value, float) and not math.isfinite(value)
        numeric = any(kind is float for kind, _ in parts(FIELDS[key].annotation, FIELDS[key].metadata))
        finite = ", and finite" if not_finite and numeric else ""
        line = f"{key.replace('[]', '[1]')} = {shown(value)}: must be {rule(FIELDS[key])}{finite}"
        assert problems_of(settings(key, value)) == [line]


@pytest.mark.parametrize("key", FIELDS)
def test_each_right_value_is_taken_as_it_is(key: str) -> None:
    for value in right_values(key):
        config = Config.model_validate(settings(key, value))  # without the rules that join keys
        if key == "data.sources":
            assert [source.path for source in config.data.sources] == [source["path"] for source in value]
        else:
            assert value_of(config, key) == value
            assert isinstance(value_of(config, key), bool) == isinstance(value, bool)


@pytest.mark.parametrize("key", FIELDS)
def test_a_wrong_value_from_a_file_and_from_an_override_is_told_alike(key: str, tmp_path: Path) -> None:
    path, value = tmp_path / "c.yaml", wrong_values(key)[-1]
    expected = problems_of(settings(key, value))
    assert problems_of_file(path, dump(settings(key, value))) == expected
    if "[]" not in key:
        assert problems_of_file(path, dump(BASE), f"{key}={shown(value)}") == expected


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("output_dir", "a text (not empty)"),
        ("seed", "an integer >= 0 and < 9223372036854775808"),
        ("model.config", "a text (not empty), a mapping or null"),
        ("model.trust_remote_code", "true or false"),
        ("data.sources", "a list of sources (not empty)"),
        ("data.sources[].weight", "a number > 0"),
        ("data.eval_fraction", "a number > 0 and < 1"),
        ("data.sequence_length", "an integer >= 2"),
        ("lora.target_modules", "a text (not empty) or a list of texts (not empty)"),
        ("lora.modules_to_save", "auto, a list of texts or null"),
        ("relora.restart_every", "an integer >= 1 or null"),
        ("relora.optimizer_reset", "zero, magnitude, random or keep"),
        ("relora.prune_ratio", "a number > 0 and <= 1"),
        ("schedule.min_lr_ratio", "a number >= 0 and <= 1"),
        ("training.mixed_precision", "no or bf16"),
    ],
)
def test_rules_in_words(key: str, words: str) -> None:
    assert rule(FIELDS[key]) == words


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == markdown()
    assert all(f"`{key}`" in markdown() and field.description for key, field in FIELDS.items())


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [None, 5, "text", True, [], ["a"]], ids=str)
def test_a_section_must_be_a_mapping(section: str, value: Any) -> None:
    problems = problems_of(BASE | {section: value})
    assert problems[0] == f"{section} = {shown(value)}: must be a section (a mapping of keys)"
    assert len(problems) == 1 or section == "model"  # without it no model is given


def test_entries_of_sources() -> None:
    found = problems_of(
        merged(BASE, {"data": {"sources": [{"path": "a", "weight": 0}, {}, 5, {"path": "b", "wieght": 1}]}})
    )
    assert found == [
        "data.sources[0].weight = 0: must be a number > 0",
        "data.sources[1].path: required",
        "data.sources[2] = 5: must be a section (a mapping of keys)",
        "data.sources[3].wieght = 1: unknown key; the nearest is data.sources[].weight",
    ]


def test_output_dir_is_the_only_key_without_a_default() -> None:
    assert problems_of({"model": {"config": "m"}}) == ["output_dir: required"]
    assert check(BASE).training.max_steps == 20000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("true", "'true'"),
        (5, "5"),
        ("5", "'5'"),
        ("", "''"),
        ("no", "'no'"),
        ("a b", "a b"),
        ("a\nb", '"a\\nb"'),
        (math.nan, ".nan"),
        (math.inf, ".inf"),
        ([1, "x"], "[1, x]"),
        ({"a": None}, "{a: null}"),
        ("x" * 1000, "x" * 200 + "..."),
    ],
)
def test_values_are_shown_as_they_stand_in_a_file(value: Any, text: str) -> None:
    assert shown(value) == text


# --- unknown keys


@pytest.mark.parametrize("key", FIELDS)
def test_a_misspelt_key_names_the_right_one(key: str) -> None:
    section, dot, name = key.rpartition(".")
    misspelt = f"{name}x" if len(name) > 2 else f"{name}r"
    mapping = settings(f"{section}{dot}{misspelt}", 5)
    line = f"{section.replace('[]', '[1]')}{dot}{misspelt} = 5: unknown key; the nearest is {key}"
    assert problems_of(mapping) == [line]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_section_names_the_right_one(section: str) -> None:
    assert problems_of(BASE | {f"{section}s": {}}) == [f"{section}s = {{}}: unknown key; the nearest is {section}"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.r", "the nearest is lora.r"),
        ("lora.learning_rate", "the nearest is optim.learning_rate"),
        ("max_steps", "the nearest is training.max_steps"),
        ("optim.lr", "the nearest is optim.learning_rate"),
        ("lora.rank", "the nearest is lora.r"),
        ("qqq", "known here are output_dir, seed, model, data, lora, relora, optim, schedule, training"),
        ("schedule.qqq", "known here are warmup_steps, restart_warmup_steps, min_lr_ratio"),
    ],
)
def test_the_nearest_name(key: str, hint: str) -> None:
    assert problems_of(settings(key, 5)) == [f"{key} = 5: unknown key; {hint}"]


def test_many_mistakes_are_told_together_with_the_rules_that_join_keys(tmp_path: Path) -> None:
    text = """
output_dir: 5
lroa: {r: 3}
model: {config: m.json, name_or_path: gpt2}
lora: {r: 0, rank: 5, target_modules: "("}
schedule: {min_lr_ratio: 7, warmup_steps: 30}
training: {max_steps: 30, global_batch_size: 3, per_device_batch_size: 2}
"""
    assert problems_of_file(tmp_path / "c.yaml", text, "optim.learning_rate=fast", "nonsense") == [
        "nonsense: an override is written section.key=value",
        "output_dir = 5: must be a text (not empty)",
        "lora.r = 0: must be an integer >= 1",
        "lora.rank = 5: unknown key; the nearest is lora.r",
        "optim.learning_rate = fast: must be a number >= 0",
        "schedule.min_lr_ratio = 7: must be a number >= 0 and <= 1",
        "lroa = {r: 3}: unknown key; the nearest is lora",
        "model.config, model.name_or_path: set exactly one (from scratch, or continual training); both are set",
        "schedule.warmup_steps = 30: must be smaller than training.max_steps = 30",
        "training.global_batch_size = 3: must be a multiple of training.per_device_batch_size = 2",
        "lora.target_modules = (: not a regular expression (missing ), unterminated subpattern at position 0)",
    ]


def test_a_rule_is_silent_while_one_of_its_keys_is_wrong() -> None:
    broken = {"schedule": {"warmup_steps": 10**9}, "training": {"max_steps": -1}}
    assert problems_of(merged(BASE, broken)) == ["training.max_steps = -1: must be an integer >= 1"]


# --- the rules that join keys: what breaks each, the line, and its edge

SYNC = ("relora.sync", "training.method", "relora.restart_every", "relora.warm_start_steps", "training.max_steps")
JOINED: list[tuple[tuple[str, ...], dict[str, Any], str, dict[str, Any]]] = [
    (
        SYNC,
        {"relora": {"sync": "restart", "restart_every": None}},
        "relora.sync = restart: needs training.method relora and relora.restart_every, the processes meet there",
        {"relora": {"sync": "restart"}},
    ),
    (
        SYNC,
        {"relora": {"sync": "restart", "warm_start_steps": 1}},
        "relora.sync = restart: training.max_steps = 20000 must be relora.warm_start_steps plus a multiple of "
        "relora.restart_every = 2000, so that the processes meet at the end",
        {"relora": {"sync": "restart", "warm_start_steps": 2000}},
    ),
    (
        ("relora.sync", "relora.outer_learning_rate", "relora.outer_momentum"),
        {"relora": {"outer_momentum": 0.9}},
        "relora.outer_momentum = 0.9: goes with relora.sync = restart only",
        {"relora": {"sync": "restart", "outer_momentum": 0.9, "outer_learning_rate": 0.7}},
    ),
    (
        ("model.config", "model.name_or_path"),
        {"model": {"name_or_path": "gpt2"}},
        "model.config, model.name_or_path: set exactly one (from scratch, or continual training); both are set",
        {"model": {"config": None, "name_or_path": "gpt2"}},
    ),
    (
        ("model.config", "model.name_or_path"),
        {"model": {"config": None}},
        "model.config, model.name_or_path: set exactly one (from scratch, or continual training); neither is set",
        {},
    ),
    (
        ("model.revision", "model.name_or_path"),
        {"model": {"revision": "main"}},
        "model.revision = main: goes with model.name_or_path only",
        {"model": {"config": None, "name_or_path": "gpt2", "revision": "main"}},
    ),
    (
        ("schedule.warmup_steps", "training.max_steps"),
        {"schedule": {"warmup_steps": 600}, "training": {"max_steps": 600}},
        "schedule.warmup_steps = 600: must be smaller than training.max_steps = 600",
        {"schedule": {"warmup_steps": 599}, "training": {"max_steps": 600}},
    ),
    (
        ("relora.restart_every", "schedule.restart_warmup_steps", "training.method"),
        {"relora": {"restart_every": 99}},
        "relora.restart_every = 99: must be at least schedule.restart_warmup_steps = 100",
        {"relora": {"restart_every": 100}},
    ),
    (
        ("relora.warm_start_steps", "training.max_steps", "training.method"),
        {"relora": {"warm_start_steps": 20000}},
        "relora.warm_start_steps = 20000: must be smaller than training.max_steps = 20000, "
        "or there is no low-rank stage",
        {"relora": {"warm_start_steps": 19999}},
    ),
    (
        ("training.global_batch_size", "training.per_device_batch_size"),
        {"training": {"global_batch_size": 33}},
        "training.global_batch_size = 33: must be a multiple of training.per_device_batch_size = 16",
        {"training": {"global_batch_size": 16}},
    ),
    (
        ("training.global_batch_size", "training.per_device_batch_size", "training.num_processes"),
        {"training": {"global_batch_size": 48, "num_processes": 2}},
        "training.global_batch_size = 48: must be a multiple of training.per_device_batch_size x "
        "training.num_processes = 16 x 2 = 32",
        {"training": {"global_batch_size": 32, "num_processes": 2}},
    ),
    (
        ("data.eval_tokens", "data.sequence_length"),
        {"data": {"eval_tokens": 511}},
        "data.eval_tokens = 511: must hold at least one sample of data.sequence_length = 512",
        {"data": {"eval_tokens": 512}},
    ),
    (
        ("training.trainable", "training.method"),
        {"training": {"trainable": "attn"}},
        "training.trainable = attn: goes with training.method = full only",
        {"training": {"trainable": "attn", "method": "full"}},
    ),
    (
        ("training.trainable", "training.method"),
        {"training": {"trainable": "[", "method": "full"}},
        "training.trainable = [: not a regular expression (unterminated character set at position 0)",
        {"training": {"trainable": "[a]", "method": "full"}},
    ),
    (
        ("lora.target_modules",),
        {"lora": {"target_modules": "*x"}},
        "lora.target_modules = *x: not a regular expression (nothing to repeat at position 0)",
        {"lora": {"target_modules": ["*x"]}},  # a list holds names, not patterns
    ),
    *(
        (
            ("relora.carry_residual", "lora.base_dtype", "relora.sync"),
            {"relora": {"carry_residual": True}, "lora": {"base_dtype": dtype}},
            f"relora.carry_residual = true: needs lora.base_dtype int8 or nf4, not {dtype}",
            {"relora": {"carry_residual": True}, "lora": {"base_dtype": "nf4"}},
        )
        for dtype in ("float32", "bfloat16")
    ),
    (
        ("relora.carry_residual", "lora.base_dtype", "relora.sync"),
        {"relora": {"carry_residual": True, "sync": "restart", "restart_every": 10000}, "lora": {"base_dtype": "nf4"}},
        "relora.carry_residual = true: needs relora.sync = step; processes that train apart draw their own factors",
        {"relora": {"carry_residual": True}, "lora": {"base_dtype": "int8"}},
    ),
    (
        ("lora.forward", "lora.lora_dropout", "lora.base_dtype", "training.method"),
        {"lora": {"forward": "merged", "lora_dropout": 0.1}},
        "lora.forward = merged: lora.lora_dropout = 0.1 drops inputs of A alone; must be 0",
        {"lora": {"forward": "factored", "lora_dropout": 0.1}},
    ),
    *(
        (
            ("data.document_mask", "model.attn_implementation"),
            {"data": {"document_mask": True}, "model": {"attn_implementation": kernel}},
            f"data.document_mask = true: needs model.attn_implementation eager or sdpa, not {kernel}",
            {"data": {"document_mask": True}, "model": {"attn_implementation": "eager"}},
        )
        for kernel in ("flash_attention_2", "flash_attention_3", "flex_attention")
    ),
    (
        ("model.attn_implementation", "training.mixed_precision"),
        {"model": {"attn_implementation": "flash_attention_2"}, "training": {"mixed_precision": "no"}},
        "model.attn_implementation = flash_attention_2: needs training.mixed_precision bf16",
        {"model": {"attn_implementation": "flash_attention_2"}, "training": {"mixed_precision": "bf16"}},
    ),
]


@pytest.mark.parametrize(
    ("keys", "broken", "line", "edge"), JOINED, ids=[line.split(": ")[0] for _, _, line, _ in JOINED]
)
def test_a_rule_that_joins_keys(keys: tuple[str, ...], broken: dict[str, Any], line: str, edge: dict[str, Any]) -> None:
    assert problems_of(merged(BASE, broken)) == [line]
    assert problems_of(merged(BASE, edge)) == []
    assert all(key in FIELDS for key in keys)


def test_every_rule_that_joins_keys_is_among_them() -> None:
    assert {rule.keys for rule in RULES} == {keys for keys, *_ in JOINED}


@pytest.mark.parametrize(
    "free",
    [
        {"training": {"method": "full"}, "relora": {"restart_every": 1, "warm_start_steps": 10**6}},
        {"training": {"method": "lora"}, "relora": {"restart_every": 1}},
        {"relora": {"restart_every": None}},
    ],
)
def test_rules_of_relora_leave_other_methods_alone(free: dict[str, Any]) -> None:
    assert problems_of(merged(BASE, free)) == []


# --- reading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("010", 10),
        ("09", 9),
        ("-7", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b1", "0b1"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("off", "off"),
        ("True", True),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("'5'", "5"),
        ("{0: a, true: b}", {"0": "a", "true": "b"}),
    ],
)
def test_yaml_is_read_by_version_1_2(text: str, value: Any) -> None:
    read = parse(text)
    assert (read, type(read)) == (value, type(value))


def test_infinity_and_nan_are_numbers() -> None:
    assert parse("-.inf") == -math.inf
    assert math.isnan(parse(".nan"))


def test_merge_keys_still_work() -> None:
    assert parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {a: 1, a: 2}", "1: a\n'1': b", "- {x: 1, x: 1}"])
def test_a_key_stands_once(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="stand more than once"):
        parse(text)


WORDS_OF_NUMBERS = ("1e3", "12e4567", "010", "0o7", "5", "1:30", "2024-01-01")
WORDS_OF_YAML = ("no", "yes", "null", "true", "", "~", "a: b", "#", "two\nlines")


@pytest.mark.parametrize("word", [*WORDS_OF_NUMBERS, *WORDS_OF_YAML])
def test_what_is_written_is_read_back(word: str) -> None:
    value = {"a": word, "b": [word, 1e-8, 10**20, None, False], word: 1}
    assert parse(dump(value)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: b: c", "not valid YAML (mapping values are not allowed here"),
        ("a: [1", "not valid YAML (while parsing a flow"),
        ("a: 1\na: 2", "not valid YAML (these keys stand more than once: a "),
        ("!!python/object:os.system {}", "not valid YAML (could not determine a constructor"),
        ("? [1]\n: 2", "not valid YAML (while constructing a mapping"),
        ("a: 1\n---\nb: 2", "not valid YAML (expected a single document"),
        ("a: *b", "not valid YAML (found undefined alias"),
        ("", "must be a mapping of sections, not null"),
        ("- a", "must be a mapping of sections, not [a]"),
        ("just text", "must be a mapping of sections, not just text"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, reason: str, tmp_path: Path) -> None:
    [line] = problems_of_file(tmp_path / "c.yaml", text)
    assert line.startswith(f"{tmp_path / 'c.yaml'}: {reason}")
    assert "\n" not in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.yaml: there is no such configuration file$"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match=r"cannot be read \(.*Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=r"binary.yaml: cannot be read \(.*utf-8"):
        load_config(tmp_path / "binary.yaml")


# --- overrides


def read_with(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(dump(merged(BASE, {"lora": {"r": 7}})), encoding="utf-8")
    return load_config(path, overrides)


def test_overrides_lie_over_the_file_which_lies_over_the_defaults(tmp_path: Path) -> None:
    config = read_with(
        tmp_path, "optim.learning_rate=1e-4", "lora.lora_alpha=8", "output_dir=runs/y", "seed=3", "seed=4"
    )
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (7, 8, 0.0)
    assert (config.optim.learning_rate, config.output_dir, config.seed) == (1e-4, "runs/y", 4)


def test_overrides_take_lists_mappings_and_values_with_equals_signs(tmp_path: Path) -> None:
    config = read_with(
        tmp_path,
        "lora.target_modules=[q_proj, v_proj]",
        "data.sources=[{path: a=b, weight: 2}, {path: c}]",
        "model.config={model_type: llama}",
        "model.config.hidden_size=16",
        "schedule={warmup_steps: 5}",
    )
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert [(source.path, source.weight) for source in config.data.sources] == [("a=b", 2), ("c", 1)]
    assert config.model.config == {"model_type": "llama", "hidden_size": 16}
    assert config.schedule.warmup_steps == 5


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("lora.r", "lora.r: an override is written section.key=value"),
        ("=5", "=5: an override is written section.key=value"),
        ("", ": an override is written section.key=value"),
        ("lora..r=5", "lora..r=5: an override is written section.key=value"),
        (".r=5", ".r=5: an override is written section.key=value"),
        ("lora.r=[", "lora.r=[: the value is not valid YAML"),
        ("lora.r=", "lora.r = null: must be an integer >= 1"),
        ("lora.r==5", "lora.r = =5: must be an integer >= 1"),
        ("lora=5", "lora = 5: must be a section (a mapping of keys)"),
        ("lora.r.x=5", "lora.r.x=5: lora.r = 7 is not a section"),
        ("model.config.hidden_size=5", "model.config.hidden_size=5: model.config = model.json is not a section"),
        ("r=5", "r = 5: unknown key; the nearest is lora.r"),
        ("data.sources[0].path=x", "data.sources[0] = {path: x}: unknown key; the nearest is data.sources"),
    ],
)
def test_wrong_overrides(override: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_with(tmp_path, override)
    assert error.value.problems == [line]


# --- what follows from a configuration


def test_defaults_of_the_section_are_those_of_the_library() -> None:
    library = {field.name: field.default for field in dataclasses.fields(LoRAConfig)}
    section = LoraSection().model_dump()
    del section["master"]  # where memory is, the pipeline knows
    assert section.keys() == library.keys()
    different = {name for name, default in library.items() if section[name] != default}
    # auto is the pipeline's: it knows whether the model is pretrained. A library's weights stay as they came, and who
    # writes them through .data would not be seen by what is kept of them.
    assert different == {"modules_to_save", "base_dtype", "keep_merged"}


def test_auto_means_nothing_for_a_pretrained_model_and_the_rest_from_scratch() -> None:
    pretrained = {"model": {"config": None, "name_or_path": "gpt2"}}
    assert lora_config(check(BASE)).modules_to_save == "rest"
    assert lora_config(check(merged(BASE, pretrained))).modules_to_save is None
    for value in (None, ["lm_head"]):
        config = check(merged(BASE, {"lora": {"modules_to_save": value}}))
        assert lora_config(config).modules_to_save == (value and tuple(value))


def mark_of(mapping: dict[str, Any], model: dict[str, Any] | None = None) -> str:
    return fingerprint(identity(Config.model_validate(mapping), model or {"hidden_size": 8}))


@pytest.mark.parametrize("key", FIELDS)
def test_the_fingerprint_follows_the_keys_of_the_run_and_no_others(key: str) -> None:
    base = (
        settings(key, value_of(Config.model_validate(settings("data.sources[].path", "b")), key))
        if "[]" in key
        else BASE
    )
    default = value_of(Config.model_validate(base), key)
    for value in right_values(key):
        same = mark_of(base) == mark_of(settings(key, value))
        if key in NOT_PART_OF_THE_RUN or key == "model.config":  # its content counts, not its path
            assert same
        elif key == "data.sources" or (value, type(value)) != (default, type(default)):
            equal = type(value) in (int, float) and value == default
            assert same == (equal or value == [{"path": "python-stdlib"}])


def test_the_fingerprint_follows_the_content_of_the_models_config() -> None:
    assert mark_of(BASE, {"hidden_size": 8}) != mark_of(BASE, {"hidden_size": 16})
    assert mark_of(BASE, {"a": 1, "b": 2}) == mark_of(BASE, {"b": 2, "a": 1})


def test_the_identity_survives_json() -> None:
    facts = identity(check(merged(BASE, {"lora": {"target_modules": ["q", "v"]}})), {"hidden_size": 8})
    assert fingerprint(json.loads(json.dumps(facts))) == fingerprint(facts)


def test_derived_numbers() -> None:
    config = check(
        merged(
            BASE,
            {
                "lora": {"r": 4, "lora_alpha": 8},
                "relora": {"restart_every": 100, "warm_start_steps": 50},
                "schedule": {"warmup_steps": 10},
                "data": {"sequence_length": 128},
                "training": {"max_steps": 350, "global_batch_size": 48, "per_device_batch_size": 4},
            },
        )
    )
    assert derived_numbers(config, 3) == {
        "gradient_accumulation_steps": 4,
        "tokens_per_update": 48 * 128,
        "tokens_in_all": 350 * 48 * 128,
        "lora_scale": 2.0,
        "restarts": 2,  # after 150 and 250; the one at 350 would be at the end
        "reachable_rank": 12,
    }
    with pytest.raises(ValueError, match=r"= 48: must be a multiple of .* = 4 x 5 = 20$"):
        accumulation_steps(config, 5)


def test_the_plan_of_each_method() -> None:
    steps = {"relora": {"restart_every": 100, "warm_start_steps": 50}, "training": {"max_steps": 350}}
    config = merged(merged(BASE, steps), {"schedule": {"warmup_steps": 10}, "optim": {"warm_start_learning_rate": 0.5}})
    plans = {m: schedule_of(check(merged(config, {"training": {"method": m}}))) for m in ("relora", "lora", "full")}
    restarts = {method: [s for s in range(351) if plan.restart_due(s)] for method, plan in plans.items()}
    assert restarts == {"relora": [150, 250], "lora": [], "full": []}
    assert {method: plan.warm_start_steps for method, plan in plans.items()} == {"relora": 50, "lora": 50, "full": 350}
    assert plans["relora"].rate(9) == plans["lora"].rate(9) == 0.5
    assert plans["full"].rate(9) == 1e-3
    assert plans["relora"].rate(50) < 1e-3 / 50  # the first of 100 updates of re-warm-up
