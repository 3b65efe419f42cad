"""A program for two processes under `accelerate launch`: what can go wrong inside an engine, scenario by scenario.

Each rank prints one JSON line a scenario; test_engine_scenarios.py says what they must be. A tiny Llama trains in
full, is handed over to its low-rank stage, and restarts there; what it must come to is computed beside it in
plain torch, by each rank alone.
"""

import gc
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock, patch

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from relora import LoRAConfig, build_optimizer, inject_lora, restart
from relora.checkpoint.state import weights_in_memory
from relora.checkpoint.weights import load_weights, model_weights
from relora.data import Batch
from relora.engines import Engine, TrainState, Update, connect
from relora.method.lora import lora_delta, lora_layers
from relora.method.merged_cache import MergedWeightCache
from relora.method.names import named_parameters
from relora.method.store import Shard
from relora.model.generate import sample_text
from relora.model.tasks import CausalLM
from tests.helpers.tiny import MODEL, config

BETA1, CLIP, RANKS, MICRO_BATCHES = 0.9, 1.0, 2, 2
IN_FULL, BEFORE_RESTART, AFTER_RESTART = (0, 1), (2, 3, 4), (5, 6, 7)  # numbers of updates
BAD = 9  # the update that is not to be made
ONCE = "once"  # the argument for FSDP2 to reduce gradients once an update
PRUNINGS = ("keep", "magnitude", "random")
OFFSET = {"reinit": "offset"}  # B != 0 after the restart
# Where parameters are sharded, W + delta is not kept, whatever is asked for.
LORA = LoRAConfig(r=4, lora_alpha=8, modules_to_save="rest", forward="merged", keep_merged=True)
Tensors = dict[str, Tensor]
TASK = CausalLM()


def main() -> None:
    engine = join(mixed_precision="no", max_grad_norm=CLIP)
    rank, expected = engine.world.process_index, reference()

    def tell(scenario: str, **measured: Any) -> None:
        print(json.dumps({"scenario": scenario, "rank": rank} | measured) + "\n", end="", flush=True)

    live, measured = through_the_switch(engine, expected["full rank"])
    tell("built", **built(live))
    tell("switch", off=largest_difference(weights_of(engine, live), expected["switch"]), **measured)

    tell("bad nan", **bad_update(engine, live, all_nan))  # before there is any optimizer state
    updates(engine, live, BEFORE_RESTART[:1])
    tell("bad loss", **bad_update(engine, live, only_loss_infinite))
    tell("bad spike", **bad_update(engine, live, lambda logits: logits, max_loss=1.0))
    updates(engine, live, BEFORE_RESTART[1:])
    tell("after bad", off=largest_difference(weights_of(engine, live), expected["before restart"]))

    before, logits = snapshot(engine, live), logits_of(engine, live)
    engine.restart(live, seed=0, index=1)
    tell("logits", off=(logits_of(engine, live) - logits).abs().max().item())
    updates(engine, live, AFTER_RESTART)
    end = weights_of(engine, live)
    tell("restart", off=largest_difference(end, expected["end"]), least_moved=least_moved(end, expected["switch"]))
    for mode in PRUNINGS:
        put_back(engine, live, before)
        restart_and_go_on(engine, live, optimizer_reset=mode)
        tell(f"reset {mode}", off=largest_difference(weights_of(engine, live), expected[mode]))
    put_back(engine, live, before)
    engine.restart(live, seed=0, index=1, **OFFSET)
    tell("offset logits", off=(logits_of(engine, live) - logits).abs().max().item())
    updates(engine, live, AFTER_RESTART)
    tell("offset", off=largest_difference(weights_of(engine, live), expected["offset"]))
    for name, control in controls(engine, live).items():
        put_back(engine, live, before)
        tell(f"control {name}", **outcome(engine, live, control, expected["end"]))
    tell("checksum", **checksums(engine, live))
    for is_mixed in (False, True):
        put_back(engine, live, before)
        tell(f"mixed {is_mixed}", agreed=agree_after_rounding_differently(engine, live, is_mixed=is_mixed))
    tell("sample", num_tokens=sampled_tokens(engine, live))

    engine.release(live)
    if not engine.name.startswith("DeepSpeed"):
        tell("unread", **unread(engine, expected["switch"], optimizer_of(name="adamw_fused")))
    if engine.name.startswith("DDP"):
        tell("product unread", **unread(engine, expected["switch"], PRODUCT))
        tell("product", **product(engine, expected["before restart"], expected["product"]))
    with patch("relora.engines.registry.World", return_value=engine.world):  # they have joined already
        tell("bf16", **bf16(expected["before restart"]))
    engine.world.close()


def join(**options: Any) -> Engine:
    """The engine of this launch, with settings of ours."""
    chosen = {"training__mixed_precision": options["mixed_precision"], "training__per_device_batch_size": 2}
    chosen["training__sync_each_batch"] = ONCE not in sys.argv
    optim = {"learning_rate": 1e-2, "max_grad_norm": options["max_grad_norm"]}
    return connect(config(Path("nowhere"), Path("nowhere"), optim=optim, **chosen))


# What is computed: the same for the engine and for the reference.


def plain_model(*, low_rank: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"}))
    if low_rank:
        inject_lora(model, LORA, seed=0)
    return model


def optimizer_of(**options: Any) -> Callable[[nn.Module], Optimizer]:
    # With an epsilon above its rounding, a gradient that is nothing else moves nothing.
    return partial(build_optimizer, learning_rate=1e-2, adam_beta1=BETA1, adam_epsilon=1e-5, **options)


ADAMW = optimizer_of()
PRODUCT = optimizer_of(name="adamw_fused", factors="product", factors_learning_rate=0.05)


def micro_batches(update: int, rank: int) -> list[Batch]:
    """Rows of equal steps, which can be learned; rank 1 has fewer labels than rank 0."""
    made = []
    for number in range(MICRO_BATCHES):
        first = 17 * (RANKS * MICRO_BATCHES * update + MICRO_BATCHES * rank + number)
        ids = (first + 3 * torch.arange(16) + 40 * torch.arange(2)[:, None]) % MODEL["vocab_size"]
        labels = ids.clone()
        labels[:, : 1 + 5 * rank + number] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def backward(model: nn.Module, update: int, rank: int) -> None:
    """Gradients of one rank's share of an update, on top of what is there."""
    num_labels = sum(TASK.num_labels(batch) for r in range(RANKS) for batch in micro_batches(update, r))
    for batch in micro_batches(update, rank):
        torch.autograd.backward(TASK.loss(model, batch) / num_labels)


def reference() -> dict[str, Tensors]:
    """All of it in one process: plain torch, one AdamW a stage."""
    model = plain_model(low_rank=False)
    optimizer, found = ADAMW(model), {}

    def go_on(numbers: Sequence[int], until: str) -> None:
        for update in numbers:
            model.zero_grad()  # also what the full-rank stage has left on weights that are frozen now
            for rank in range(RANKS):
                backward(model, update, rank)
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        found[until] = {name: p.detach().clone() for name, p in named_parameters(model).items()}

    go_on(IN_FULL, "full rank")
    inject_lora(model, LORA, seed=0)
    optimizer = ADAMW(model)
    go_on((), "switch")
    go_on(BEFORE_RESTART, "before restart")
    before = deepcopy((model.state_dict(), optimizer.state_dict()))
    restarts: dict[str, Any] = {"end": {}, **{mode: {"optimizer_reset": mode} for mode in PRUNINGS}, "offset": OFFSET}
    for until, how in restarts.items():
        model.load_state_dict(before[0])
        optimizer.load_state_dict(deepcopy(before[1]))
        restart(model, optimizer, seed=0, index=1, **how)
        go_on(AFTER_RESTART, until)
    model.load_state_dict(before[0])
    optimizer = PRODUCT(model)
    go_on(BEFORE_RESTART, "product before restart")
    restart(model, optimizer, seed=0, index=1, **OFFSET)
    go_on(AFTER_RESTART, "product")
    return found


# The same through the engine.


def begin(
    engine: Engine,
    *,
    low_rank: bool,
    values: Mapping[str, Tensor] | None = None,
    optimizer: Callable[[nn.Module], Optimizer] = ADAMW,
) -> TrainState:
    """A model in the engine's hands, its weights written through the store as the program does it."""
    model = plain_model(low_rank=low_rank)
    drawn = {name: p.detach().clone() for name, p in named_parameters(model).items()}
    live = engine.prepare(model, optimizer)
    load_weights(live.model, weights_in_memory(dict(values or drawn)), engine.store)
    return live


def one_update(engine: Engine, live: TrainState, number: int, *, max_loss: float = 1e3) -> Update:
    batches = micro_batches(number, engine.world.process_index)
    return engine.update(live, batches, seeds=[0, 0], stop=False, max_loss=max_loss)


def updates(engine: Engine, live: TrainState, numbers: Sequence[int]) -> None:
    for number in numbers:
        update = one_update(engine, live, number)
        assert not update.skipped, f"update {number}: loss {update.loss}, norm {update.grad_norm}"


def restart_and_go_on(engine: Engine, live: TrainState, **how: Any) -> None:
    engine.restart(live, seed=0, index=1, **how)
    updates(engine, live, AFTER_RESTART)


def weights_of(engine: Engine, live: TrainState) -> Tensors:
    return {name: engine.store.read(p).clone() for name, p in named_parameters(live.model).items()}


def snapshot(engine: Engine, live: TrainState) -> dict[str, Any]:
    """Weights, moments and step counts, as a checkpoint has them."""
    trained = {name: p for name, p in named_parameters(live.model).items() if p.requires_grad}
    moments = {name: moments_of(engine, live, p) for name, p in trained.items()}
    return {
        "weights": weights_of(engine, live),
        "slots": {f"{name}:{slot}": values for name, of in moments.items() for slot, values in of.items()},
        "steps": {name: engine.store.step(live.optimizer, p) for name, p in trained.items()},
    }


def moments_of(engine: Engine, live: TrainState, parameter: nn.Parameter) -> Tensors:
    store, optimizer = engine.store, live.optimizer
    return {slot: store.read_slot(optimizer, parameter, slot).clone() for slot in store.slots(optimizer, parameter)}


def put_back(engine: Engine, live: TrainState, saved: dict[str, Any]) -> None:
    """Go on from a snapshot, as a resume does."""
    parameters = named_parameters(live.model)
    load_weights(live.model, weights_in_memory(dict(saved["weights"])), engine.store)
    for key, values in saved["slots"].items():
        name, _, slot = key.rpartition(":")
        engine.store.write_slot(live.optimizer, parameters[name], slot, values)
    for name, step in saved["steps"].items():
        engine.store.write_step(live.optimizer, parameters[name], step)


def logits_of(engine: Engine, live: TrainState) -> Tensor:
    with engine.inference(live):
        logits: Tensor = live.model(input_ids=micro_batches(0, 0)[0]["input_ids"]).logits
    return logits


def largest_difference(ours: Tensors, theirs: Tensors) -> float:
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max().item() for name in ours), default=0.0)


def least_moved(ours: Tensors, theirs: Tensors) -> float:
    """How far the tensor that moved least has moved."""
    return min((ours[name] - theirs[name]).abs().max().item() for name in ours)


# Scenarios.


def built(live: TrainState) -> dict[str, Any]:
    """What became of the launcher's options."""
    model, optimizer = cast(LlamaForCausalLM, live.model), live.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    return {"optimizer": type(inner).__name__, "recomputes": model.is_gradient_checkpointing}


def through_the_switch(engine: Engine, expected: Tensors) -> tuple[TrainState, dict[str, Any]]:
    """The full-rank stage, its hand-over to the low-rank one as train.py does it, and what is left of it then."""
    full = begin(engine, low_rank=False)
    updates(engine, full, IN_FULL)
    was = weights_of(engine, full)
    state = [values for p in full.model.parameters() for values in only_for_training(engine, full.optimizer, p)]
    shown = [next(iter(engine.store.local_copies(p).values())).values for p in full.model.parameters()]
    old_state, old_weights = ([StorageWeakRef(values.untyped_storage()) for values in held] for held in (state, shown))
    old_objects = [weakref.ref(thing) for thing in (full.model, full.parallel_model, full.optimizer)]
    del state, shown

    engine.release(full)
    still = weights_of(engine, full)
    handover = model_weights(full.model, engine.store)
    del full
    gc.collect()
    num_state_left = sum(not there.expired() for there in old_state)

    live = engine.prepare(plain_model(low_rank=True), ADAMW)
    load_weights(live.model, handover, engine.store, factors=False)
    del handover
    gc.collect()
    return live, {
        "full_rank_off": largest_difference(was, expected),
        "released_off": largest_difference(still, was),
        "num_state": len(old_state),
        "num_state_left": num_state_left,
        "num_weights_left": sum(not there.expired() for there in old_weights),
        # A hook of the old engine on the new model would keep one of them alive.
        "objects_left": [type(there()).__name__ for there in old_objects if there() is not None],
    }


def only_for_training(engine: Engine, optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Moments, and masters beside what the model shows, where they rest."""
    store: Any = engine.store
    masters = [part.values for part in list(store.local_copies(parameter).values())[1:]]
    if hasattr(store, "slot_shards"):
        return [*masters, *(part.values for part in store.slot_shards(optimizer, parameter).values())]
    return [*masters, *(store.read_slot(optimizer, parameter, slot) for slot in store.slots(optimizer, parameter))]


@contextmanager
def hooked(engine: Engine, live: TrainState, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it the logits of rank 1 alone are changed."""
    if engine.world.process_index == 0:
        yield
        return
    hook = live.model.get_submodule("lm_head").register_forward_hook(lambda *args: change(args[2]))
    yield
    hook.remove()


def all_nan(logits: Tensor) -> Tensor:
    return logits * math.nan


def only_loss_infinite(logits: Tensor) -> Tensor:
    """One token, which is a label, is impossible: its loss is infinite, and every gradient finite."""
    label = micro_batches(BAD, 1)[0]["labels"][0, -1]
    return logits.index_fill(-1, label, -math.inf)


def bad_update(
    engine: Engine, live: TrainState, change: Callable[[Tensor], Tensor], *, max_loss: float = 1e3
) -> dict[str, Any]:
    before = snapshot(engine, live)
    with hooked(engine, live, change):
        update = one_update(engine, live, BAD, max_loss=max_loss)
    after = snapshot(engine, live)
    return {
        "skipped": update.skipped.item(),
        "loss": str(update.loss.item()),
        "weights_off": largest_difference(after["weights"], before["weights"]),
        "slots_off": largest_difference(after["slots"], before["slots"]),
        "steps_equal": after["steps"] == before["steps"],
    }


def product(engine: Engine, start: Tensors, expected: Tensors) -> dict[str, Any]:
    """Updates and a restart with an optimizer of the factors of their own."""
    live = begin(engine, low_rank=True, values=start, optimizer=PRODUCT)
    updates(engine, live, BEFORE_RESTART)
    restart_and_go_on(engine, live, **OFFSET)
    end = weights_of(engine, live)
    agreed = engine.world.all_equal(engine.checksum(live))
    engine.release(live)
    return {"off": largest_difference(end, expected), "least_moved": least_moved(end, start), "agreed": agreed}


def unread(engine: Engine, start: Tensors, optimizer: Callable[[nn.Module], Optimizer]) -> dict[str, Any]:
    """A good update, a bad one and another good one, none of which the host looks at before all are asked for."""
    live = begin(engine, low_rank=True, values=start, optimizer=optimizer)
    ask = partial(engine.update, live, seeds=[0, 0], stop=False)
    results = [ask(micro_batches(0, engine.world.process_index))]
    before = snapshot(engine, live)
    with hooked(engine, live, only_loss_infinite):
        results.append(ask(micro_batches(BAD, engine.world.process_index)))
    after = snapshot(engine, live)
    results.append(ask(micro_batches(1, engine.world.process_index)))
    end = weights_of(engine, live)
    measured = {"on_device": live.skips_on_device, "skipped": [result.skipped.item() for result in results]}
    engine.release(live)
    return measured | {
        "first_moved": largest_difference(before["weights"], start),
        "weights_off": largest_difference(after["weights"], before["weights"]),
        "slots_off": largest_difference(after["slots"], before["slots"]),
        "steps_equal": after["steps"] == before["steps"],
        "last_moved": largest_difference(end, after["weights"]),
    }


def controls(engine: Engine, live: TrainState) -> dict[str, Callable[[], None]]:
    """Restarts, the first as it should be, the others with one thing done wrong."""
    store = engine.store
    [layer, *_] = lora_layers(live.model).values()
    names = [*store.local_copies(layer.lora_A)]

    def wrong(method: str, instead: Callable[..., Any], **how: Any) -> Callable[[], None]:
        def go() -> None:
            with patch.object(store, method, instead):
                engine.restart(live, seed=0, index=1, **how)
            updates(engine, live, AFTER_RESTART)

        return go

    found = {
        "right": lambda: restart_and_go_on(engine, live),
        "moments kept": lambda: restart_and_go_on(engine, live, optimizer_reset="keep"),
        "moments not written": wrong("write_slot", Mock()),
        "step not written": wrong("write_step", Mock()),
        "pruning not written": wrong("write_slot", Mock(), optimizer_reset="random"),
    }
    found |= {f"stale {name}": wrong("write", stale(store, name)) for name in names}
    if len(names) > 1:
        found["only what the model shows"] = wrong("local_copies", first_copy_only(store))
    if store.local_copies(layer.weight)[names[0]].values.numel() < store.shape(layer.weight).numel():
        found["a part one row off"] = wrong("local", one_row_off(store, engine.world.process_index))
    return found


def first_copy_only(store: Any) -> Callable[[nn.Parameter], Mapping[str, Shard]]:
    copies = store.local_copies
    return lambda parameter: dict([next(iter(copies(parameter).items()))])


def one_row_off(store: Any, rank: int) -> Callable[[nn.Parameter], Shard]:
    """Rank 1 takes the part of a frozen weight that it holds for the one that begins a row earlier."""
    local = store.local

    def shifted(parameter: nn.Parameter) -> Shard:
        part: Shard = local(parameter)
        if parameter.requires_grad or rank == 0:
            return part
        return replace(part, start=part.start - store.shape(parameter)[1])

    return shifted


def stale(store: Any, name: str) -> Callable[[nn.Parameter, Tensor], None]:
    """A write that leaves one copy as it was."""
    write = store.write

    def incomplete(parameter: nn.Parameter, values: Tensor) -> None:
        old = store.local_copies(parameter)[name].values.clone()
        write(parameter, values)
        store.local_copies(parameter)[name].values.copy_(old)

    return incomplete


def outcome(engine: Engine, live: TrainState, control: Callable[[], None], expected: Tensors) -> dict[str, Any]:
    """What a control raised, or how far off it came out."""
    try:
        control()
    except RuntimeError as error:
        return {"raised": str(error), "off": None}
    return {"raised": None, "off": largest_difference(weights_of(engine, live), expected)}


def checksums(engine: Engine, live: TrainState) -> dict[str, bool]:
    """Whether the ranks agree, and whether they still do when rank 1 alone changes a parameter of each kind."""
    parameters, all_equal = named_parameters(live.model), engine.world.all_equal

    def agree_with(name: str) -> bool:
        shown = next(iter(engine.store.local_copies(parameters[name]).values())).values
        shown.view(-1)[:1] += engine.world.process_index
        agreed = all_equal(engine.checksum(live))
        shown.view(-1)[:1] -= engine.world.process_index
        return agreed

    layer = "model.layers.1.mlp.up_proj"
    names = {"W": f"{layer}.weight", "A": f"{layer}.lora_A", "B": f"{layer}.lora_B", "norm": "model.norm.weight"}
    unchanged = all_equal(engine.checksum(live))
    return {"unchanged": unchanged} | {kind: agree_with(name) for kind, name in names.items()}


def agree_after_rounding_differently(engine: Engine, live: TrainState, *, is_mixed: bool) -> bool:
    """Whether the ranks agree after a restart whose products come out a little larger on rank 1.

    Args:
        is_mixed: whether they know that their devices are of different kinds.
    """

    def rounded(*args: Any, **how: Any) -> Tensor:
        return lora_delta(*args, **how) * (1 + 1e-6 * engine.world.process_index)

    with patch.object(engine.world, "is_mixed", is_mixed), patch("relora.method.merge.lora_delta", rounded):
        engine.restart(live, seed=0, index=1)
    return engine.world.all_equal(engine.checksum(live))


def sampled_tokens(engine: Engine, live: TrainState) -> int:
    """Number of tokens that this rank samples before the end: rank 1 meets it at once, rank 0 never."""
    end, rank = 7, engine.world.process_index
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(MODEL["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{end}")

    def at_once_or_never(*args: Any) -> Tensor:
        return cast(Tensor, args[2]).index_fill(-1, torch.tensor([end]), math.inf if rank else -math.inf)

    hook = live.model.get_submodule("lm_head").register_forward_hook(at_once_or_never)
    with engine.inference(live):
        text = sample_text(
            cast(Any, live.model), tokenizer, "w3 w6 w9", max_new_tokens=5, temperature=0.0, seed=0, together=True
        )
    hook.remove()
    return len(tokenizer(text).input_ids) - 3


def bf16(start: Tensors) -> dict[str, Any]:
    """Gradients of one update in bf16, out of the first moments; and in which dtype everything is held."""
    engine = join(mixed_precision="bf16", max_grad_norm=None)
    live = begin(engine, low_rank=True, values=start)
    with patch.object(MergedWeightCache, "get", autospec=True, side_effect=MergedWeightCache.get) as kept:
        updates(engine, live, (0,))
    together = any(layer.siblings is not None and layer.can_group for layer in lora_layers(live.model).values())
    of_engine, held = {}, set()
    for name, p in named_parameters(live.model).items():
        held |= {str(part.values.dtype) for part in engine.store.local_copies(p).values()}
        if p.requires_grad:
            held |= {str(slot.dtype) for slot in engine.store.slots(live.optimizer, p).values()}
            of_engine[name] = moments_of(engine, live, p)["exp_avg"] / (1 - BETA1)
    engine.release(live)
    errors = gradient_errors(start, of_engine, together=together)
    return errors | {"dtypes": sorted(held), "together": together, "num_kept": kept.call_count}


def gradient_errors(start: Tensors, of_engine: Tensors, *, together: bool) -> dict[str, float]:
    """The engine's gradients against each rank's own in autocast, summed in fp32; and those rounded to bf16.

    Relative to the largest entry of each tensor.

    Args:
        together: q, k and v are computed by one call, which rounds the gradient of their x in another order.
    """
    model = plain_model(low_rank=True)
    for layer in lora_layers(model).values():
        if layer.siblings is not None and not together:
            layer.siblings.dissolve()
    for name, p in named_parameters(model).items():
        p.data.copy_(start[name])
    by_rank = []
    for rank in range(RANKS):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            backward(model, 0, rank)
        by_rank.append({name: p.grad.clone() for name, p in named_parameters(model).items() if p.grad is not None})
    exact = {name: by_rank[0][name] + by_rank[1][name] for name in of_engine}
    rounded = {name: sum(grads[name].bfloat16().float() for grads in by_rank) for name in of_engine}

    def off(found: Mapping[str, Any], name: str) -> float:
        return ((found[name] - exact[name]).abs().max() / exact[name].abs().max().clamp_min(1e-30)).item()

    of_linear = "lm_head.weight"
    return {
        "off": max(off(of_engine, name) for name in of_engine),
        "off_of_linear": off(of_engine, of_linear),
        "off_if_rounded": off(rounded, of_linear),
    }


if __name__ == "__main__":
    main()
