"""Reading configurations: files, the files they extend, overrides, unknown keys."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from relora.config import Config, UserError, find_config, load_config
from relora.config.names import ELSEWHERE, NOT_HERE
from relora.config.reference import fields
from relora.config.yaml12 import dump
from tests.config.tree import BASE, FIELDS, SECTIONS, merged, problems_of, problems_of_file, settings

ROOT = Path(__file__).resolve().parents[2]


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
        ("qqq", "known here are output_dir, seed, hub_timeout_s, model, data, lora, relora, optim, schedule, training"),
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
        "output_dir = 5: must be a non-empty string",
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


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: b: c", "not valid YAML (mapping values are not allowed here"),
        ("a: [1", "not valid YAML (while parsing a flow"),
        ("a: 1\na: 2", "not valid YAML (these keys appear more than once: a "),
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


# --- extends, and shipped configurations


def write(path: Path, **content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(content), encoding="utf-8")
    return path


def test_a_file_lies_over_those_it_extends(tmp_path: Path) -> None:
    write(
        tmp_path / "low" / "base.yaml",
        output_dir="runs/x",
        model={"config": {"model_type": "llama", "hidden_size": 8}},
        lora={"r": 7, "lora_alpha": 3, "target_modules": ["q", "v"]},
        data={"sources": [{"path": "a"}, {"path": "b"}]},
    )
    write(tmp_path / "middle.yaml", extends="low/base.yaml", lora={"r": 8}, seed=5)
    path = write(
        tmp_path / "top.yaml",
        extends="middle.yaml",
        lora={"target_modules": ["o"]},
        model={"config": {"hidden_size": 16}},
        data={"sources": [{"path": "c"}]},
    )
    config = load_config(path, ["lora.lora_dropout=0.5"])
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout, config.seed) == (8, 3, 0.5, 5)
    assert config.lora.target_modules == ("o",)
    assert config.model.config == {"model_type": "llama", "hidden_size": 16}
    assert [source.path for source in config.data.sources] == ["c"]


def test_what_is_wrong_with_extends(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.yaml", extends="two.yaml"), write(tmp_path / "two.yaml", extends="one.yaml")
    for path, line in (
        (one, f"{one}: extends itself ({one} -> {two} -> {one})"),
        (
            write(tmp_path / "none.yaml", extends="other.yaml"),
            f"{tmp_path}/other.yaml: there is no such configuration file",
        ),
        (
            write(tmp_path / "list.yaml", extends=["a"]),
            "list.yaml: extends = [a]: must be a path or the name of a config",
        ),
        (
            write(tmp_path / "empty.yaml", extends=""),
            "empty.yaml: extends = '': must be a path or the name of a config",
        ),
    ):
        with pytest.raises(UserError) as error:
            load_config(path)
        [problem] = error.value.problems
        assert line in problem


def test_an_unknown_key_names_its_file_where_there_are_several(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", **BASE, lora={"rr": 1}, data={"sources": [{"path": "a", "wieght": 1}]})
    top = write(tmp_path / "top.yaml", extends="base.yaml", lora={"q_alpha": 1})
    with pytest.raises(UserError) as error:
        load_config(top, ["lora.lora_alhpa=3"])
    assert error.value.problems == [
        f"data.sources[0].wieght = 1: unknown key in {base}; the nearest is data.sources[].weight",
        f"lora.rr = 1: unknown key in {base}; the nearest is lora.r",
        f"lora.q_alpha = 1: unknown key in {top}; the nearest is lora.lora_alpha",
        "lora.lora_alhpa = 3: unknown key; the nearest is lora.lora_alpha",
    ]


def test_a_name_of_a_shipped_configuration_is_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "quickstart.yaml"
    assert find_config("quickstart") == find_config("quickstart.yaml") == shipped
    assert load_config("quickstart") == load_config(shipped)
    extended = load_config(write(tmp_path / "mine.yaml", extends="quickstart", seed=3))
    assert extended == load_config("quickstart", ["seed=3"])
    with pytest.raises(UserError, match=r"^quikstart: there is no such .*; the nearest shipped one is quickstart$"):
        load_config("quikstart")
    own = write(tmp_path / "quickstart.yaml", **BASE)
    assert find_config("quickstart.yaml").resolve() == own
    assert find_config("./quickstart") == Path("quickstart")


def test_the_file_of_a_model_is_found_here_beside_its_configuration_or_among_the_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolved(name: str) -> Any:
        path = write(tmp_path / "configs" / "c.yaml", output_dir="runs/x", model={"config": name})
        return load_config(path).model.config

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs" / "m.json")
    assert resolved("m.json") == str(tmp_path / "configs" / "m.json")
    write(tmp_path / "m.json")
    assert resolved("m.json") == "m.json"
    assert resolved("configs/models/llama_9m.json") == str(ROOT / "configs" / "models" / "llama_9m.json")
    assert resolved("models/llama_9m.json") == str(ROOT / "configs" / "models" / "llama_9m.json")
    assert resolved("nowhere.json") == "nowhere.json"


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


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.gradient_accumulation_steps", "not a setting here: it follows from training.global_batch_size and"),
        ("training.num_train_epochs", "not a setting here: the length of a run is training.max_steps"),
        ("training.per_device_train_batch_size", "the nearest is training.per_device_batch_size"),
        ("training.lr_scheduler_type", "not a setting here: the schedule is a cosine with restarts"),
        ("training.warmup_ratio", "not a setting here: warm-up is counted in updates, schedule.warmup_steps"),
        ("training.bf16", "the nearest is training.mixed_precision"),
        ("training.optim", "the nearest is optim.name"),
        ("training.report_too", "the nearest is training.report_to"),
        ("training.weight_decay", "the nearest is optim.weight_decay"),
        ("training.dataloader_num_workers", "the nearest is data.num_workers"),
        ("training.deepspeed", "not a setting here: the launcher chooses it"),
        ("lora.alpha", "the nearest is lora.lora_alpha"),
        ("lora.task_type", "not a setting here: training.task is the task"),
        ("lora.init_lora_weights", "not a setting here: relora.reinit is how factors are drawn"),
        ("max_seq_length", "the nearest is data.sequence_length"),
        ("training.skip_memory_metrics", "known here are method, "),
    ],
)
def test_a_setting_of_another_program_is_told_what_it_is_here(key: str, hint: str) -> None:
    [problem] = problems_of(settings(key, 5))
    assert problem.startswith(f"{key} = 5: unknown key; {hint}")


def test_names_of_other_programs_lead_to_keys_that_exist() -> None:
    known = set(dict(fields()))
    assert set(ELSEWHERE.values()) <= known
    assert not NOT_HERE.keys() & ELSEWHERE.keys()
    for reason in NOT_HERE.values():
        keys = re.findall(r"\b(?:training|data|model|lora|relora|schedule|optim)\.\w+", reason)
        assert set(keys) <= known, reason


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "lora.target_modules=q_proj,v_proj",
            "lora.target_modules = q_proj,v_proj: is one regex of whole names; a list is written [q_proj, v_proj]",
        ),
        (
            "lora.modules_to_save=embed_tokens, lm_head",
            "lora.modules_to_save = embed_tokens, lm_head: must be auto, a list of strings or null; a list is written "
            "[embed_tokens, lm_head]",
        ),
    ],
)
def test_a_list_without_brackets(override: str, problem: str, tmp_path: Path) -> None:
    assert problems_of_file(tmp_path / "c.yaml", dump(BASE), override) == [problem]


def test_a_regex_with_a_comma_is_none(tmp_path: Path) -> None:
    assert problems_of_file(tmp_path / "c.yaml", dump(BASE), r"lora.target_modules='.*q_{1,2}proj'") == []
    for pattern in ("(" * 2000 + ")" * 2000, "a{99999999999}"):
        assert len(problems_of_file(tmp_path / "c.yaml", dump(BASE), f"lora.target_modules='{pattern}'")) == 1


def nested(times: int, merged: bool) -> str:
    lines = ["a0: &a0 {k: 1}"]
    for n in range(1, times):
        aliases = ", ".join([f"*a{n - 1}"] * 9)
        lines.append(f"a{n}: &a{n} {{<<: [{aliases}]}}" if merged else f"a{n}: &a{n} [{aliases}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 1000 + "]" * 1000, "nested too deeply"),
        ("{a: " * 90 + "1" + "}" * 90, "nested deeper than 60 levels"),
        (nested(30, merged=False), "more than 100,000 values, aliases included"),
        (nested(30, merged=True), "<< merges more than 100,000 keys"),
        ("model: {config: &a {b: *a}}", "nested deeper than 60 levels"),
        ("seed: !!bool text", "a value does not fit its tag (KeyError: 'text')"),
        ("seed: !!timestamp x", "a value does not fit its tag"),
        ("seed: !!set {a}", "a value of type set, which JSON cannot hold"),
        ("seed: !!binary aGk=", "a value of type bytes, which JSON cannot hold"),
        ('output_dir: "\\ud800"', r"'\ud800' is not Unicode text"),
        (f"seed: {'9' * 5000}", "a value does not fit its tag"),
        (f"seed: 0x{'f' * 100}", "an integer of 400 bits; 128 are the most"),
        ("# " + "x" * 100_000, "has 100,002 characters, more than 100,000"),
    ],
    ids=range(13),
)
def test_yaml_that_is_no_plain_data_is_refused_at_once(text: str, reason: str, tmp_path: Path) -> None:
    begin = time.process_time()
    [problem] = problems_of_file(tmp_path / "c.yaml", text)
    assert reason in problem
    assert time.process_time() - begin < 2


def test_a_list_of_many_wrong_entries_is_told_at_once(tmp_path: Path) -> None:
    begin = time.process_time()
    [problem] = problems_of_file(tmp_path / "c.yaml", dump(BASE), f"lora.modules_to_save={[1] * 2000}")
    assert problem.startswith("lora.modules_to_save = [1, 1, ")
    assert time.process_time() - begin < 2
