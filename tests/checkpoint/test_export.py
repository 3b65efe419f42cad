"""The exported model is the live one: for transformers, merged, in any dtype, tied or not, with all it came with."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from relora.checkpoint.load import complete_checkpoints, open_checkpoint, open_states
from relora.checkpoint.portable import FOUR_AND_FIVE
from relora.checkpoint.run_folder import RunFolder
from relora.checkpoint.run_model import keep_files, read_kept_config, token_ids
from relora.checkpoint.weights import load_weights, merged_model
from relora.cli import main
from relora.commands.load_model import load
from relora.config import check, load_config
from relora.config.derived import lora_config, tokenizer_of
from relora.data import prepare
from relora.method.inject import inject_lora
from relora.method.store import TorchStore
from relora.model.model import empty_model, load_hf_config
from relora.model.tasks import CausalLM, task_of
from relora.train.train import train
from tests.helpers.tiny import MODEL, metrics, only, settings

# transformers itself would refuse to save a temperature without sampling; published models have it.
GENERATION = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [261, 0], "pad_token_id": 5}
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
TOKEN = "hf_" + "Q7" * 17
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


def live_model(run: Path) -> PreTrainedModel:
    """The model as it trained: wrapped, its factors beside W."""
    config = load_config(run / "config.yaml")
    model = empty_model(config.model, load_hf_config(config.model, task_of(config)), task_of(config))
    inject_lora(model, lora_config(config))
    load_weights(model, open_checkpoint(complete_checkpoints(run / "checkpoints")[-1]).weights, TorchStore())
    return model.eval()


@pytest.mark.parametrize("model", [MODEL, MODEL | {"tie_word_embeddings": True}, GPT2], ids=["untied", "tied", "gpt2"])
def test_final_computes_what_the_run_computes(model: dict[str, Any], tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run(model={"config": dict(model)}, training__save_steps=6)
    train(check(tree))
    run = Path(tree["output_dir"])
    ids = torch.randint(300, (3, 20))
    live = live_model(run)
    assert all(layer.abs().max() > 0 for name, layer in live.named_parameters() if name.endswith("lora_B"))
    exported = AutoModelForCausalLM.from_pretrained(run / "final")
    torch.testing.assert_close(exported(ids).logits, live(ids).logits, atol=1e-5, rtol=0)
    is_tied = exported.get_output_embeddings().weight is exported.get_input_embeddings().weight
    assert is_tied == bool(model.get("tie_word_embeddings", model["model_type"] == "gpt2"))


def test_a_machine_without_the_kernels_of_a_run_merges_its_weights(run: Path) -> None:
    config, checkpoint = load_config(run / "config.yaml"), complete_checkpoints(run / "checkpoints")[-1]
    of_a_gpu = config.model_copy(update={"lora": config.lora.model_copy(update={"kernels": "triton"})})
    hf_config = load_hf_config(config.model, task_of(config))
    ours, theirs = (merged_model(open_states(checkpoint), c, hf_config, task_of(c)) for c in (config, of_a_gpu))
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)


def test_the_folder_is_complete(run: Path) -> None:
    names = {path.name for path in (run / "final").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    exported = AutoModelForCausalLM.from_pretrained(run / "final")
    assert exported.generation_config.eos_token_id == tokenizer.eos_token_id
    assert exported.config.use_cache is True
    card = (run / "final" / "README.md").read_text()
    assert "| eval_loss |" in card
    assert "restart_every: 3" in card
    # As transformers 4 reads it too.
    assert FOUR_AND_FIVE in card
    written = {
        name: json.loads((run / "final" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    }
    assert written["config.json"]["rope_theta"] == 10000.0
    assert written["tokenizer_config.json"]["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_export_of_an_earlier_step_in_bfloat16(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--dtype", "bfloat16", "--step", "8"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert exported.dtype == torch.bfloat16


def test_eval_of_the_final_model_is_the_runs_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (run / "final", run):
        assert main(["eval", str(target)]) == 0
        assert f"held-out loss {only(metrics(run), 'eval_loss')[12]:.4f} nats" in capsys.readouterr().out


def test_eval_keeps_documents_apart(
    tiny_run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_run(data__document_mask=True)
    train(check(tree))
    assert main(["eval", f"{tree['output_dir']}/final"]) == 0
    assert f"held-out loss {only(metrics(tree['output_dir']), 'eval_loss')[12]:.4f} nats" in capsys.readouterr().out
    # So short a run could agree to four decimals with a leak; this sees one at once.
    assert CausalLM().leaks(load(f"{tree['output_dir']}/final")[0], 300, document_mask=True) == []


def test_a_sample_ends_where_the_positions_end(
    tiny_run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_run(model={"config": GPT2 | {"n_positions": 32}}, training__max_steps=5)
    train(check(tree))
    assert main(["generate", tree["output_dir"], "--prompt", "the old fox " * 30, "--max-new-tokens", "500"]) == 0
    assert "fox" in capsys.readouterr().out


def test_a_redone_run_replaces_its_final_model(tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run()
    train(check(tree))
    run, weights = Path(tree["output_dir"]), Path(tree["output_dir"], "final", "model.safetensors")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    before = weights.stat().st_ino
    train(check(tree | {"training": tree["training"] | {"per_device_batch_size": 8}}))
    assert weights.stat().st_ino != before


def test_eval_of_any_model_on_a_config(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "final").rename(tmp_path / "moved")
    try:
        assert main(["eval", str(tmp_path / "moved"), "--config", str(run / "config.yaml")]) == 0
        assert f"held-out loss {only(metrics(run), 'eval_loss')[12]:.4f} nats" in capsys.readouterr().out
    finally:
        (tmp_path / "moved").rename(run / "final")


def test_generate_is_a_function_of_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(run), "--prompt", "the fox", "--max-new-tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the fox")


def test_continue_from_a_pretrained_folder(run: Path, tiny_run: Callable[..., dict[str, Any]]) -> None:
    tree = tiny_run(
        "continued",
        model={"name_or_path": str(run / "final")},
        relora={"restart_every": 4, "warm_start_steps": 0},
        training__max_steps=6,
    )
    train(check(tree))
    lines = metrics(tree["output_dir"])
    assert only(lines, "eval_loss")[0] == pytest.approx(only(metrics(run), "eval_loss")[12], abs=1e-5)
    assert only(lines, "eval_loss")[6] < only(lines, "eval_loss")[0]
    parameter_report = load_config(Path(tree["output_dir"]) / "config.yaml")
    assert lora_config(parameter_report).modules_to_save is None, "embeddings of a pretrained model stay frozen"


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with two tokens that end a text, settings of sampling and a chat template."""
    folder = tmp_path_factory.mktemp("hub") / "published"
    shutil.copytree(run / "final", folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 261, "pad_token_id": 5}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def continued(run: Path, published: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run that continued the published model, which is gone from its place afterwards."""
    tree = settings(
        corpus,
        tmp_path_factory.mktemp("continued") / "run",
        model={"name_or_path": str(published)},
        relora={"restart_every": 2, "warm_start_steps": 0},
        training__max_steps=3,
    )
    # The same tokens have been prepared for another model, which has no chat template.
    prepare(check(tree).data, vocab_size=300, tokenizer=str(run / "final"), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        train(check(tree))
    gone = published.with_name("gone")
    published.rename(gone)
    yield Path(tree["output_dir"])
    gone.rename(published)


def test_the_published_settings_are_in_the_final_model(continued: Path) -> None:
    final = continued / "final"
    generation = json.loads((final / "generation_config.json").read_text())
    assert {key: generation[key] for key in GENERATION} == GENERATION
    config = json.loads((final / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([261, 0], 5)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "<hello>"


def test_export_evaluation_and_generation_need_the_run_alone(
    continued: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(continued), "--output", str(tmp_path / "out")]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", continued / "final"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("generation_config.json", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (continued / "final" / name).read_text()
    assert main(["generate", str(continued), "--prompt", "the fox", "--max-new-tokens", "3"]) == 0
    capsys.readouterr()
    assert main(["eval", str(continued)]) == 0
    assert f"held-out loss {only(metrics(continued), 'eval_loss')[3]:.4f} nats" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_kept_its_settings_alone(continued: Path, tmp_path: Path) -> None:
    (continued / "model").rename(tmp_path / "model")
    try:
        assert main(["export", str(continued), "--output", str(tmp_path / "out")]) == 0
    finally:
        (tmp_path / "model").rename(continued / "model")
    exported, final = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", continued / "final"))
    ids = torch.randint(300, (2, 20))
    assert torch.equal(exported(ids).logits, final(ids).logits)
    assert exported.config.eos_token_id == [261, 0]


@pytest.mark.parametrize("trusted", [True, False])
def test_code_that_comes_with_a_model_is_kept_if_it_may_run(
    trusted: bool, run: Path, corpus: Path, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", RunFolder(tmp_path / "run")
    shutil.copytree(run / "final", base)
    model: dict[str, Any] = {"name_or_path": str(base), "trust_remote_code": trusted}
    (base / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (base / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    if trusted:
        own = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
        config = json.loads((base / "config.json").read_text()) | {"model_type": "mine", "auto_map": own}
        (base / "config.json").write_text(json.dumps(config))
    config = check(settings(corpus, folder.path, model=model))
    data = prepare(config.data, vocab_size=300, quiet=True, **tokenizer_of(config))
    folder.path.mkdir()
    keep_files(folder, config, data)
    shutil.rmtree(base)
    task = task_of(config)
    kept = empty_model(config.model, read_kept_config(folder, config, task), task)
    assert type(kept).__name__ == ("Mine" if trusted else "LlamaForCausalLM")
    assert len(list(folder.model.glob("*.py"))) == (2 if trusted else 0)


def test_each_of_several_tokens_ends_a_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "eager"
    shutil.copytree(run / "final", folder)
    tokenizer, prompt = AutoTokenizer.from_pretrained(folder), "the fox"
    lengths = []
    for ends in ([0], list(range(300))):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert main(["generate", str(folder), "--prompt", prompt, "--max-new-tokens", "20", "--temperature", "0"]) == 0
        text = capsys.readouterr().out.removesuffix("\n").removeprefix(prompt)
        lengths.append(len(tokenizer(text)["input_ids"]))
    assert lengths[0] > 5
    assert lengths[1] <= 1


def test_token_ids(corpus: Path, tmp_path: Path, run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    scratch = check(settings(corpus, tmp_path))
    given = {"model": {"name_or_path": "gpt2"}}
    own = check(settings(corpus, tmp_path, **given))
    other = check(settings(corpus, tmp_path, **given, data__tokenizer="gpt2"))
    known = {"bos_token_id": 7, "eos_token_id": [2, 0, 9], "pad_token_id": None}
    assert token_ids(known, tokenizer, scratch) == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert token_ids(known, tokenizer, own) == {"bos_token_id": 7, "eos_token_id": [2, 0, 9], "pad_token_id": 0}
    # Of a vocabulary that is not the model's own, 2, 7 and 9 may be any tokens.
    assert token_ids(known, tokenizer, other) == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert token_ids({"eos_token_id": 4}, tokenizer, own)["eos_token_id"] == [4, 0]


def test_no_secret_of_the_environment_is_kept(continued: Path) -> None:
    files = [path for path in continued.rglob("*") if path.is_file()]
    assert {"config.yaml", "status.json", "README.md", "metrics.jsonl"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_files_have_the_modes_that_the_umask_gives(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    for folder, umask in ((tmp_path / "out", 0o027), (run, before)):
        paths = [path for path in (folder, *folder.rglob("*")) if path.name != ".lock"]
        assert len(paths) > 5
        wrong = {path: path.stat().st_mode & 0o777 for path in paths}
        assert {p: oct(mode) for p, mode in wrong.items() if mode != (0o777 if p.is_dir() else 0o666) & ~umask} == {}
