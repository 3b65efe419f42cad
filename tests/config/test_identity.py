"""The reference in words, derived numbers, and the identity of a run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relora.config import Config, LoraSection, check
from relora.config.derived import accumulation_steps, derived_numbers, fingerprint, identity, lora_config, schedule_of
from relora.config.reference import markdown, rule
from relora.method.lora import LoRAConfig
from tests.config.tree import BASE, FIELDS, merged, settings, value_of
from tests.config.values import right_values
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
# Values of newer keys that runs older than the key had unasked. What differs in its place is the hash of the tokens.
AS_BEFORE = [("data.add_bos", False)]
# The keys of which DESIGN.md says that another value is the same run, computed otherwise.
NOT_PART_OF_THE_RUN = {
    *("lora.forward", "lora.keep_merged", "lora.kernels", "lora.master"),
    *("output_dir", "hub_timeout_s"),
    *("model.attn_implementation", "model.gradient_checkpointing", "model.torch_compile", "model.liger_kernel"),
    *("data.prepared_dir", "data.num_proc", "data.num_workers"),
    *("training.per_device_batch_size", "training.per_device_eval_batch_size", "training.mixed_precision"),
    *("training.num_processes", "training.eval_steps", "training.save_steps", "training.save_total_limit"),
    *("training.logging_steps", "training.probe_steps", "training.sync_each_batch", "training.async_save"),
    *("training.max_hours", "training.timeout_minutes"),
    *("training.peak_tflops", "training.report_to", "training.engine"),
}


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("output_dir", "a non-empty string"),
        ("seed", "an integer >= 0 and < 9223372036854775808"),
        ("model.config", "a non-empty string, a mapping or null"),
        ("model.trust_remote_code", "true or false"),
        ("data.sources", "a non-empty list of sources"),
        ("data.sources[].weight", "a number > 0"),
        ("data.eval_fraction", "a number > 0 and < 1"),
        ("data.sequence_length", "an integer >= 2"),
        ("lora.target_modules", "a non-empty string or a non-empty list of strings"),
        ("lora.modules_to_save", "auto, a list of strings or null"),
        ("relora.restart_every", "an integer >= 1 or null"),
        ("relora.optimizer_reset", "zero, magnitude, random, keep or module:attribute"),
        ("optim.name", "adamw, adamw_fused, adamw_8bit, muon or module:attribute"),
        ("training.task", "causal_lm or module:attribute"),
        ("data.skip", "a list of pairs of integers >= 0"),
        ("training.report_to", "a list of names, each tensorboard or module:attribute"),
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
        assert lora_config(config).modules_to_save == tuple(value or ())


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
            equal = (type(value) in (int, float) and value == default) or (key, value) in AS_BEFORE
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
    offset = check(merged(config.model_dump(mode="json"), {"relora": {"reinit": "offset"}}))
    assert derived_numbers(offset, 3)["reachable_rank"] == 24  # a cycle changes W by B A - B0 A0
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


# The identity of `tests.helpers.tiny` as release 0.1 wrote it, but for the optimizer, whose default has changed since.
OF_RELEASE_0_1 = {
    "seed": 0,
    "model.config": tiny.MODEL,
    "model.name_or_path": None,
    "model.revision": None,
    "model.trust_remote_code": False,
    "data.sources": [{"path": "corpus", "name": None, "split": "train", "revision": None, "weight": 1.0}],
    "data.text_field": "text",
    "data.tokenizer": None,
    "data.sequence_length": 32,
    "data.eval_fraction": 0.1,
    "data.eval_tokens": 256,
    "data.document_mask": False,
    "lora.r": 4,
    "lora.lora_alpha": 6.0,
    "lora.use_rslora": False,
    "lora.lora_dropout": 0.0,
    "lora.bias": "none",
    "lora.target_modules": "all-linear",
    "lora.modules_to_save": "auto",
    "lora.base_dtype": "float32",
    "relora.restart_every": 3,
    "relora.warm_start_steps": 4,
    "relora.reinit": "kaiming",
    "relora.optimizer_reset": "zero",
    "relora.prune_ratio": 0.9,
    "relora.carry_residual": False,
    "relora.sync": "step",
    "relora.outer_learning_rate": 1.0,
    "relora.outer_momentum": 0.0,
    "optim.name": "adamw",
    "optim.learning_rate": 0.01,
    "optim.warm_start_learning_rate": None,
    "optim.adam_beta1": 0.9,
    "optim.adam_beta2": 0.95,
    "optim.adam_epsilon": 1e-08,
    "optim.weight_decay": 0.0,
    "optim.max_grad_norm": 1.0,
    "schedule.warmup_steps": 2,
    "schedule.restart_warmup_steps": 1,
    "schedule.min_lr_ratio": 0.1,
    "training.method": "relora",
    "training.trainable": None,
    "training.max_steps": 12,
    "training.global_batch_size": 8,
}


def test_keys_added_since_do_not_change_the_identity_of_an_older_run() -> None:
    older = tiny.settings(Path("corpus"), Path("run"), optim__name="adamw")
    facts = identity(check(older), dict(tiny.MODEL))
    assert facts == OF_RELEASE_0_1
    assert fingerprint(facts) == "37bc8cf7eaac32d1"


@pytest.mark.parametrize("name", ["training.task", "optim.name", "relora.reinit", "relora.optimizer_reset"])
def test_a_users_own_object_is_part_of_the_identity(name: str) -> None:
    facts = identity(check(settings(name, "my_package.module:Thing")), {})
    assert facts[name] == "my_package.module:Thing"
    assert fingerprint(facts) != mark_of(BASE, {})


def test_the_configuration_loads_no_torch() -> None:
    rooms = ("schema", "rules", "load", "config_file", "reference", "yaml12")
    program = (
        "import sys, relora.config, relora.errors, relora.files\n"
        f"for room in {rooms}: __import__(f'relora.config.{{room}}')\n"
        "from relora.config import load_config\n"
        "load_config('quickstart')\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_a_new_key_of_transformers_is_no_other_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that adds a key to the class, here LlamaConfig; another value of the key is another run."""
    from transformers import LlamaConfig

    from relora.checkpoint.run_folder import RunFolder, run_folder_problems, saved_identity
    from relora.model.model import load_hf_config
    from relora.model.tasks import CausalLM
    from relora.train.run import run_identity

    config, folder = check(tiny.settings(corpus, tmp_path)), RunFolder(tmp_path)
    before = run_identity(config, load_hf_config(config.model, CausalLM()))
    folder.write_config(config, identity=before, numbers={})
    folder.final.mkdir()
    read_by_both = LlamaConfig.__post_init__

    def with_a_new_key(self: LlamaConfig, **kwargs: Any) -> None:
        self.brand_new = kwargs.pop("brand_new", self.num_hidden_layers * 3)
        read_by_both(self, **kwargs)

    monkeypatch.setattr(LlamaConfig, "__post_init__", with_a_new_key)
    hf_config = load_hf_config(config.model, CausalLM())
    assert hf_config.to_dict()["brand_new"] == 6
    resumed = run_identity(config, hf_config, saved_identity(folder))
    assert run_folder_problems(folder, resumed, extend=False) == []
    assert fingerprint(resumed) == fingerprint(before)
    changed = check(tiny.settings(corpus, tmp_path, model__config=tiny.MODEL | {"brand_new": 7}))
    other = run_identity(changed, load_hf_config(changed.model, CausalLM()), saved_identity(folder))
    assert run_folder_problems(folder, other, extend=False) == [
        f"output_dir = {tmp_path}: holds another run: model.config.brand_new is None there and 7 here"
    ]
    wider = check(tiny.settings(corpus, tmp_path, model__config=tiny.MODEL | {"hidden_size": 64}))
    other = run_identity(wider, load_hf_config(wider.model, CausalLM()), saved_identity(folder))
    assert any("model.config.hidden_size is 32 there" in p for p in run_folder_problems(folder, other, extend=False))
