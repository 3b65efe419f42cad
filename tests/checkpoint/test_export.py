"""The exported model is the live one: for transformers, merged, in any dtype, tied or not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from relora.checkpoint.load import complete_checkpoints, open_checkpoint
from relora.checkpoint.weights import load_weights
from relora.cli import main
from relora.commands.load_model import load
from relora.config import check, load_config
from relora.config.derived import lora_config
from relora.method.inject import inject_lora
from relora.method.store import TorchStore
from relora.model.model import empty_model, load_hf_config
from relora.model.tasks import CausalLM, task_of
from relora.train.train import train
from tests.helpers.tiny import MODEL, metrics, only

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
