"""How fast data are prepared and read: `python -m benchmarks.data [--megabytes 40] [--num-proc N] [--json FILE]`.

Rows: tokenization (both sides of the split, all of prepare but the training of the tokenizer), finding a sample far
away, and reading one batch of 16 x 512 in the training process, also as a share of a step of the 9m model on it.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import Limit, options_of, publish
from relora import LoRAConfig, build_optimizer, inject_lora
from relora.config.input_sections import DataSection, ModelSection, SourceSection
from relora.data import PreparedData, prepare
from relora.data.sources import StdlibSource
from relora.data.tokenize import usable_cores
from relora.model.model import build_model, load_hf_config
from relora.model.tasks import CausalLM

VOCAB_SIZE = 32_000
PREPARING, FINDING, READING = "prepare, MB/s per process", "find sample 10**9, us", "reading, % of that step"


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RELORA_CACHE"] = folder
        results = measure(Path(folder), options.megabytes, options.num_proc)
    limits = [
        Limit(PREPARING, results[PREPARING], at_least=1),
        Limit(FINDING, results[FINDING], at_most=10),
        Limit(READING, results[READING], at_most=2),
    ]
    rows = [{"what": name, "value": value} for name, value in results.items()]
    publish({"Data": rows}, limits, json_path=options.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=40, help="size of the corpus")
    parser.add_argument("--num-proc", type=int, default=usable_cores(), help="processes; default: all cores")
    return options_of(parser)


def measure(folder: Path, megabytes: int, num_proc: int) -> dict[str, float]:
    data, num_bytes = corpus(folder / "corpus.jsonl", megabytes)
    tokenizer = folder / "tokenizer"
    prepare(DataSection(), vocab_size=VOCAB_SIZE, tokenizer=None, quiet=True).tokenizer().save_pretrained(tokenizer)
    cpu_before_s = cpu_s()
    prepared, prepare_s = timed(data, tokenizer, num_proc=num_proc)
    prepare_cpu_s = cpu_s() - cpu_before_s
    _, one_s = timed(data.model_copy(update={"prepared_dir": str(folder / "one")}), tokenizer, num_proc=1)
    megabytes_done = num_bytes / 1e6
    return {
        "corpus, MB": megabytes_done,
        "processes": num_proc,
        "tokens per byte": prepared.manifest.sources[0].train.tokens / num_bytes,
        "prepare, MB/s": megabytes_done / prepare_s,
        PREPARING: megabytes_done / prepare_s / num_proc,
        "prepare, MB per CPU second": megabytes_done / prepare_cpu_s,
        "prepare with num_proc 1 (threads), MB/s": megabytes_done / one_s,
        **reading(prepared, data),
        **share_of_a_step(prepared, data),
    }


def corpus(path: Path, megabytes: int) -> tuple[DataSection, int]:
    """The standard library over and over, each copy a document of its own, in documents of about 4 kB."""
    num_bytes = 0
    texts = StdlibSource(SourceSection(path="python-stdlib")).load("text", 1)["text"]
    with path.open("w") as file:
        for copy in range(10**6):
            for text in texts:
                for start in range(0, len(text), 4000):
                    document = f"# copy {copy}\n{text[start : start + 4000]}"
                    num_bytes += len(document.encode())
                    file.write(json.dumps({"text": document}) + "\n")
                if num_bytes >= megabytes * 10**6:
                    return DataSection.model_validate({"sources": [{"path": str(path)}]}), num_bytes
    raise AssertionError("unreachable")


def timed(data: DataSection, tokenizer: Path, *, num_proc: int) -> tuple[PreparedData, float]:
    began = time.perf_counter()
    data = data.model_copy(update={"num_proc": num_proc})
    prepared = prepare(data, vocab_size=VOCAB_SIZE, tokenizer=str(tokenizer), quiet=True)
    return prepared, time.perf_counter() - began


def cpu_s() -> float:
    """CPU time of this process and of its finished workers: on a busy machine the truer clock."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def reading(prepared: PreparedData, data: DataSection) -> dict[str, float]:
    results = {}
    for document_mask in (False, True):
        samples = prepared.samples(data.model_copy(update={"document_mask": document_mask}), seed=0)
        name = f"batch of 16 x 512{' with document_mask' if document_mask else ''}, ms"
        results[name] = 1e3 * seconds_each(lambda i, s=samples: s.__getitems__(range(16 * i, 16 * i + 16)), 300)
    results[FINDING] = 1e6 * seconds_each(lambda i: samples.locate(10**9 + i), 20_000)
    return results


def share_of_a_step(prepared: PreparedData, data: DataSection, rounds: int = 5) -> dict[str, float]:
    """Reading against training on what was read, in turn, medians: the machine's drift hits both."""
    section = ModelSection(config=str(Path(__file__).parents[1] / "configs" / "models" / "llama_9m.json"))
    task = CausalLM()
    model = build_model(section, load_hf_config(section, task), task, seed=0)
    inject_lora(model, LoRAConfig(r=32, modules_to_save="rest"))
    optimizer, samples = build_optimizer(model), prepared.samples(data, seed=0)
    reading_s, training_s = [], []
    for number in range(rounds + 1):
        began = time.perf_counter()
        batch = samples.__getitems__(range(16 * number, 16 * number + 16))
        read = time.perf_counter()
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        reading_s.append(read - began)
        training_s.append(time.perf_counter() - read)
    read_s, step_s = statistics.median(reading_s[1:]), statistics.median(training_s[1:])
    return {"step of llama 9m on 16 x 512, ms": 1e3 * step_s, READING: 100 * read_s / step_s}


def seconds_each(call: Callable[[int], object], times: int) -> float:
    call(0)
    began = time.perf_counter()
    for i in range(times):
        call(i)
    return (time.perf_counter() - began) / times


if __name__ == "__main__":
    main()
