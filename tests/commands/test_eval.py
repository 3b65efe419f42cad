"""`relora eval RUN --config OTHER`: on text that the run has not seen, or not at all."""

import json
import random
import shutil

import pytest
import yaml

from relora.commands.eval import held_out
from relora.config import UserError, load_config
from relora.data import eval_batches, num_trained_on, prepare


@pytest.fixture
def other(run, tmp_path):
    """The run's own configuration with other values in `data`."""

    def make(**changes):
        tree = yaml.safe_load((run / "config.yaml").read_text())
        tree["data"] |= changes
        path = tmp_path / "other.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(str(path))

    return make


def test_text_that_the_run_was_trained_on_is_refused(run, other):
    config = other(eval_fraction=0.5)
    with pytest.raises(UserError) as caught:
        held_out(str(run), config)
    (line,) = caught.value.problems
    data = [
        prepare(c.data, vocab_size=300, tokenizer=str(run / "tokenizer"))
        for c in (config, load_config(run / "config.yaml"))
    ]
    common = num_trained_on(*data)
    assert common > 3
    assert line == (
        f"data.eval_fraction = 0.5: the run was trained on {common} of the documents that this holds out; the run held "
        "out 0.1: set data.eval_fraction to 0.1 or less"
    )


def test_the_remedy_works(run, other):
    """A smaller fraction holds out documents that the run held out too."""
    assert held_out(str(run), other()).num_tokens == held_out(str(run)).num_tokens > 0


def test_other_text_may_be_held_out_by_any_fraction(run, other, tmp_path, caplog):
    rng = random.Random(5)
    words = ["ball", "cat", "door", "even", "fall"]
    with (tmp_path / "new.jsonl").open("w") as file:
        for number in range(40):
            file.write(json.dumps({"text": f"{number} {' '.join(rng.choices(words, k=40))}"}) + "\n")
    found = held_out(str(run), other(eval_fraction=0.5, sources=[{"path": str(tmp_path / "new.jsonl")}]))
    assert found.num_tokens > 200 and "may have been trained" not in caplog.text


def test_what_nobody_can_know_is_said(run, other, tmp_path, caplog):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    for sources in (tree["data"]["sources"], tree["derived"]["identity"]["data.sources"]):
        sources[0]["path"] = str(tmp_path / "gone.jsonl")
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    assert held_out(str(copy), other(eval_fraction=0.5)).num_tokens > 0
    assert "the run may have been trained on documents that this holds out; the run held out 0.1" in caplog.text


def test_a_run_is_evaluated_on_its_own_tokens(run, other, tmp_path):
    """A configuration that names no tokenizer would train another one, whose ids the model has never seen."""
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": f"{n} zzzz qqqq" * 30}) + "\n" for n in range(30)))
    config = other(sources=[{"path": str(tmp_path / "new.jsonl")}])
    num_labels = {}
    for tokenizer in (str(run / "tokenizer"), None):
        data = prepare(config.data, vocab_size=300, tokenizer=tokenizer)
        batches = eval_batches(data, config.data, batch_size=4)
        num_labels[tokenizer] = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    own, trained_anew = num_labels.values()
    assert held_out(str(run), config).num_tokens == own != trained_anew
