"""A program for two processes: the loss of rank 1 alone is not a number, once."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relora import LoRAConfig, build_optimizer, inject_lora
from relora.runtime.engines.local import LocalEngine
from relora.runtime.engines.processes import Processes
from tests.tiny import MODEL


def main() -> None:
    engine = LocalEngine(Processes(num_processes=None), mixed_precision="no", max_grad_norm=1.0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"}))
    inject_lora(model, LoRAConfig(r=2, modules_to_save="rest"))
    live = engine.prepare(model, build_optimizer)
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(engine.processes.rank))
    batch = {"input_ids": ids, "labels": ids}

    before = {name: values.clone() for name, values in model.state_dict().items()}
    if engine.processes.rank == 1:
        hook = model.lm_head.register_forward_hook(lambda *args: args[2] * float("nan"))
    bad = engine.update(live, [batch], seeds=[0], stop=False)
    unchanged = all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    no_state = not live.optimizer.state
    if engine.processes.rank == 1:
        hook.remove()
    good = engine.update(live, [batch], seeds=[0], stop=False)
    if not bad.applied and unchanged and no_state and good.applied:
        print("rank skipped and unchanged, then updated\n", end="", flush=True)
    engine.processes.close()


if __name__ == "__main__":
    main()
