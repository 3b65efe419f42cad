"""The task of a run: the shift of the labels, what the metrics are, which models leak, and a user's own task."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from relora import inject_lora
from relora.checkpoint.weights import trained_heads
from relora.config import UserError, check
from relora.config.derived import lora_config
from relora.data.batches import IGNORED_LABEL
from relora.model import tasks
from relora.model.model import build_model, problems, read_hf_config, read_skeleton
from relora.model.tasks import Batch, CausalLM, Task, task_of
from tests.helpers.tiny import MODEL

SHAPE = {key: value for key, value in MODEL.items() if key != "model_type"}
TASK = CausalLM()
Settings = Callable[..., dict[str, Any]]


class FirstToken(Task):
    """A user's own: the class of a row is the parity of its first token."""

    auto_class = AutoModelForSequenceClassification
    description = "sequence classifier"

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {"input_ids": batch["input_ids"]}

    def targets(self, batch: Batch) -> Tensor:
        return batch["input_ids"][:, 0] % 2

    def make_batch(self, rows: Any, sequence_length: int, *, eos_id: int, document_mask: bool) -> dict[str, Tensor]:
        return TASK.make_batch(rows, sequence_length, eos_id=eos_id, document_mask=document_mask)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 5:] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


def test_the_loss_is_that_of_transformers_summed() -> None:
    torch.manual_seed(0)
    model, samples = LlamaForCausalLM(LlamaConfig(**SHAPE)), batch()
    theirs = model(**samples).loss
    assert TASK.num_labels(samples) == 4 + 15 + 15
    torch.testing.assert_close(TASK.loss(model, samples) / TASK.num_labels(samples), theirs)


def test_targets_are_aligned_with_the_logits_that_predict_them() -> None:
    labels = torch.tensor([[7, 8, 9], [5, IGNORED_LABEL, IGNORED_LABEL]])
    targets = TASK.targets({"labels": labels})
    assert targets.tolist() == [[8, 9, IGNORED_LABEL], [IGNORED_LABEL] * 3]


def test_metrics() -> None:
    assert TASK.metrics(2.0) == {"eval_loss": 2.0, "eval_perplexity": pytest.approx(math.exp(2))}
    assert TASK.metrics(1e4)["eval_perplexity"] == math.inf


def test_a_model_that_sees_the_future_leaks() -> None:
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    both_ways = BertLMHeadModel(BertConfig(**shape, num_attention_heads=2, is_decoder=False))
    causal = LlamaForCausalLM(LlamaConfig(**SHAPE))
    causal.config.use_cache = False
    [leak] = TASK.leaks(both_ways, 300, document_mask=False)
    assert leak.startswith("model: BertLMHeadModel sees the tokens that it is to predict")
    assert TASK.leaks(causal, 300, document_mask=True) == []
    causal.config.use_cache = True  # transformers then ignores the positions
    assert ["lets attention through" in leak for leak in TASK.leaks(causal, 300, document_mask=True)] == [True]


def test_a_users_own_task_builds_its_model_and_has_a_loss(tiny_run: Settings) -> None:
    config = check(tiny_run(training__task=f"{__name__}:FirstToken"))
    task = task_of(config)
    hf_config, found = read_hf_config(config.model, task)
    assert hf_config is not None and found == []
    model = build_model(config.model, hf_config, task, seed=0)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    model.config.pad_token_id = 0
    samples = batch()
    expected = F.cross_entropy(model(samples["input_ids"]).logits, samples["input_ids"][:, 0] % 2, reduction="sum")
    torch.testing.assert_close(task.loss(model, samples), expected)
    assert (task.num_labels(samples), task.metrics(1.0)) == (3, {"eval_loss": 1.0})
    assert problems(model, config, task) == task.leaks(model, 300, document_mask=False) == []


def test_a_head_that_trains_may_be_missing_from_pretrained_weights(tiny_run: Settings, tmp_path: Path) -> None:
    torch.manual_seed(1)
    body = LlamaForCausalLM(LlamaConfig(**SHAPE))
    body.save_pretrained(tmp_path)
    hf_config, heads = LlamaConfig(**SHAPE, num_labels=2), []
    tree = tiny_run(training__task=f"{__name__}:FirstToken", relora__warm_start_steps=0)
    tree["model"] = {"name_or_path": str(tmp_path)}
    for seed in (0, 0, 1):
        config = check(tree | {"seed": seed})
        fresh = partial(trained_heads, config=config)
        model = build_model(config.model, hf_config, task_of(config), seed=seed, may_lack=fresh)
        torch.testing.assert_close(model.model.embed_tokens.weight, body.model.embed_tokens.weight)
        report = inject_lora(model, lora_config(config))
        assert report.full.num_parameters == 2 * 32 and model.score.weight.requires_grad
        heads.append(model.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    # One that would stay as it was drawn is refused, as any other weight.
    for section, key, value in (("lora", "modules_to_save", None), ("training", "trainable", "layers")):
        changed = {section: {**tree[section], key: value}}
        if section == "training":
            changed["training"]["method"] = "full"
        config = check(tree | changed)
        fresh = partial(trained_heads, config=config)
        with pytest.raises(UserError, match=r"lacks 1 weights of the model, such as score\.weight"):
            build_model(config.model, hf_config, task_of(config), seed=0, may_lack=fresh)


def test_a_task_that_the_architecture_does_not_have(tiny_run: Settings) -> None:
    config = check(tiny_run(training__task=f"{__name__}:FirstToken", model__config={"model_type": "vit"}))
    _, found = read_hf_config(config.model, task_of(config))
    assert found == ["model.config: model_type vit has no sequence classifier in transformers"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("causal", "training.task = causal: must be causal_lm, or module:attribute; the nearest is causal_lm"),
        ("no_such_module:Mine", "training.task = no_such_module:Mine: cannot be imported"),
        ("math:pi", "training.task = math:pi: must be a subclass of relora.model.tasks.Task"),
    ],
)
def test_mistakes_in_the_name(name: str, message: str, tiny_run: Settings) -> None:
    config = check(tiny_run())
    config = config.model_copy(update={"training": config.training.model_copy(update={"task": name})})
    with pytest.raises(UserError) as error:
        task_of(config)
    assert error.value.problems[0].startswith(message)


def test_a_skeleton_has_names_and_no_memory_or_a_reason(tiny_run: Settings) -> None:
    section = check(tiny_run()).model
    hf_config, _ = read_hf_config(section, CausalLM())
    assert hf_config is not None
    model, found = read_skeleton(section, hf_config, CausalLM())
    assert model is not None and found == []
    assert all(p.is_meta for p in model.parameters())
    hf_config.hidden_act = "gleu"
    assert read_skeleton(section, hf_config, CausalLM()) == (
        None,
        ["model.config: transformers cannot build the model: KeyError: 'gleu'"],
    )


def test_the_shift_stands_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything that is scored goes through `targets`: without labels there, loss and count are zero.
    monkeypatch.setattr(CausalLM, "targets", lambda _, batch: torch.full_like(batch["labels"], IGNORED_LABEL))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    assert TASK.num_labels(batch()) == TASK.loss(model, batch()) == 0
    assert tasks.TASKS["causal_lm"] is CausalLM
