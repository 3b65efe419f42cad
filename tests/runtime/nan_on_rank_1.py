"""A program for two processes: the loss of rank 1 alone is not a number, once."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora import LoRAConfig, build_optimizer, inject_lora
from relora.runtime.engines import Live
from relora.runtime.engines.local import LocalEngine
from tests.tiny import MODEL


def main() -> None:
    engine = LocalEngine(mixed_precision="no", num_processes=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"}))
    inject_lora(model, LoRAConfig(r=2, modules_to_save="rest"))
    live = Live(model=model, wrapped=engine.prepare(model, compiled=False), optimizer=build_optimizer(model))
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(engine.rank))
    batch = {"input_ids": ids, "labels": ids}

    before = {name: values.clone() for name, values in model.state_dict().items()}
    if engine.rank == 1:
        hook = model.lm_head.register_forward_hook(lambda *args: args[2] * float("nan"))
    bad = engine.update(live, [batch], seeds=[0], max_grad_norm=1.0)
    unchanged = all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    no_state = not live.optimizer.state
    if engine.rank == 1:
        hook.remove()
    good = engine.update(live, [batch], seeds=[0], max_grad_norm=1.0)
    if not bad.applied and unchanged and no_state and good.applied:
        print("rank skipped and unchanged, then updated\n", end="", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
