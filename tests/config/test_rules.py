"""The cross-field rules: a configuration that breaks each, the line, and its edge."""

from typing import Any

import pytest

from relora.config.rules import RULES
from tests.config.tree import BASE, FIELDS, merged, problems_of

SYNC = ("relora.sync", "training.method", "relora.restart_every", "relora.warm_start_steps", "training.max_steps")
OFFSET = ("relora.reinit", "relora.sync", "optim.learning_rate", "optim.factors_learning_rate")
JOINED: list[tuple[tuple[str, ...], dict[str, Any], str, dict[str, Any]]] = [
    (
        SYNC,
        {"relora": {"sync": "restart", "restart_every": None}},
        "relora.sync = restart: needs training.method relora and relora.restart_every, when processes synchronize",
        {"relora": {"sync": "restart"}},
    ),
    (
        SYNC,
        {"relora": {"sync": "restart", "warm_start_steps": 1}},
        "relora.sync = restart: training.max_steps = 20000 must be relora.warm_start_steps plus a multiple of "
        "relora.restart_every = 2000, so that the processes synchronize at the end",
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
        "relora.carry_residual = true: needs relora.sync = step; else each process draws its own factors",
        {"relora": {"carry_residual": True}, "lora": {"base_dtype": "int8"}},
    ),
    (
        OFFSET,
        {"relora": {"reinit": "offset", "sync": "restart"}},
        "relora.reinit = offset: needs relora.sync = step; else each process draws its own factors",
        {"relora": {"sync": "restart"}},
    ),
    (
        OFFSET,
        {"relora": {"reinit": "offset"}, "optim": {"learning_rate": 0.0}},
        "relora.reinit = offset: the learning rate of the factors, by which relora.offset_norm counts, is 0",
        {"relora": {"reinit": "offset"}, "optim": {"learning_rate": 0.0, "factors_learning_rate": 1e-9}},
    ),
    *(
        (
            ("optim.name", "training.method", "relora.warm_start_steps", "lora.target_modules", "lora.modules_to_save"),
            {"optim": {"name": "muon"}, "relora": {"warm_start_steps": 0}},
            "optim.name = muon: with training.method = relora and no warm start no hidden matrix trains in full; set "
            "relora.warm_start_steps, narrow lora.target_modules, or choose another optimizer",
            {"optim": {"name": "muon"}} | allowed,
        )
        for allowed in (
            {"relora": {"warm_start_steps": 10}},
            {"relora": {"warm_start_steps": 0}, "lora": {"target_modules": ["q_proj"]}},
            {"relora": {"warm_start_steps": 0}, "lora": {"modules_to_save": ["up_proj"]}},
            {"relora": {"warm_start_steps": 0}, "training": {"method": "full"}},
        )
    ),
    (
        ("lora.forward", "lora.lora_dropout", "lora.base_dtype", "training.method"),
        {"lora": {"forward": "merged", "lora_dropout": 0.1}},
        "lora.forward = merged: lora.lora_dropout = 0.1 drops inputs of A alone; must be 0",
        {"lora": {"forward": "factored", "lora_dropout": 0.1}},
    ),
    (
        ("lora.kernels", "lora.lora_dropout", "training.method"),
        {"lora": {"kernels": "triton", "lora_dropout": 0.1}},
        "lora.kernels = triton: lora.lora_dropout = 0.1 drops inputs of A alone; must be 0",
        {"lora": {"kernels": "triton"}},
    ),
    (
        ("data.skip",),
        {"data": {"skip": [[0, 3], [7, 7]]}},
        "data.skip = [[7, 7]]: a pair [first, end] leaves out the samples first <= i < end, so first must be smaller "
        "than end",
        {"data": {"skip": [[0, 3], [7, 8]]}},
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


def test_a_rule_is_silent_while_one_of_its_keys_is_wrong() -> None:
    broken = {"schedule": {"warmup_steps": 10**9}, "training": {"max_steps": -1}}
    assert problems_of(merged(BASE, broken)) == ["training.max_steps = -1: must be an integer >= 1"]
