"""The stages of the battery, the most valuable first, and in each its steps, likewise.

A step is a program of benchmarks/ with `--json`. A stage takes at most eight minutes: a step that has no time left
is made when the stage is asked for again.
"""

from dataclasses import dataclass

STAGE_MINUTES = 8.0
MODEL = "--model configs/models/llama_{size}.json --bf16 --sequence 512"
LLAMA_1B, LLAMA_350M, LLAMA_7B = (MODEL.format(size=size) for size in ("1b", "350m", "7b"))
# Llama 3 8B as NeMo AutoModel's table has it: frozen bf16 weights, r = 16, nothing else trains, rows of 4096 tokens.
# One row at a time, not two: PEFT's model and ours are in the memory of one GPU together, and nothing is recomputed.
LLAMA_3_8B = "--model benchmarks/gpu/llama3_8b.json --bf16 --base-dtype bfloat16 --no-train-rest --rank 16"
TINY = (
    "--layers 1 --hidden-size 32 --intermediate-size 80 --heads 2 --vocab-size 64 --rank 4 --batch 2 --sequence 16 "
    "--bf16"
)


@dataclass(frozen=True)
class Step:
    """One program.

    Attributes:
        name: unique in its stage.
        program: module of `benchmarks`.
        arguments: on a GPU.
        tiny: instead of them in a dry run; None leaves the step out: another step, or a test, runs the same program.
        minutes: it is ended after so many, and counts as failed.
    """

    name: str
    program: str
    arguments: str
    tiny: str | None = None
    minutes: float = 4.0


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    steps: tuple[Step, ...]


STAGES = (
    Stage(
        "checks",
        "Checks",
        (
            Step("tests", "gpu.checks", "", "-k test_a_weight_is_stored", minutes=6),
            Step("kernels", "kernels", "--tokens 8192 --repeats 5"),
            Step("profile", "gpu.profile", "--size 1b --picture {out}/profile.png", "--size tiny"),
        ),
    ),
    Stage(
        "speed",
        "Speed and memory of an update",
        (
            Step(
                "llama 1b",
                "step",
                f"{LLAMA_1B} --batch 16 --rounds 8 --methods full peft ours",
                f"{TINY} --rounds 1 --methods full peft ours",
            ),
            Step(
                "llama 1b, memory",
                "step",
                f"{LLAMA_1B} --batch 16 --memory --methods full peft ours",
                f"{TINY} --memory --methods full ours",
            ),
            Step(
                "llama 3 8b",
                "step",
                f"{LLAMA_3_8B} --batch 1 --sequence 4096 --rounds 5 --methods peft ours",
                f"{TINY} --rounds 1 --base-dtype bfloat16 --no-train-rest --methods peft ours",
            ),
            Step(
                "llama 3 8b, memory",
                "step",
                f"{LLAMA_3_8B} --batch 1 --sequence 4096 --memory --methods peft ours",
            ),
            Step(
                "llama 7b nf4",
                "step",
                f"{LLAMA_7B} --batch 4 --rounds 5 --base-dtype nf4 --methods peft ours",
                f"{TINY} --rounds 1 --base-dtype nf4 --methods peft ours",
            ),
            Step(
                "llama 7b nf4, memory",
                "step",
                f"{LLAMA_7B} --batch 4 --base-dtype nf4 --memory --methods peft ours",
            ),
            Step(
                "llama 1b, compiled",
                "step",
                f"{LLAMA_1B} --batch 16 --rounds 5 --compile --methods full ours",
            ),
            Step(
                "form cost",
                "form_cost",
                "--shapes 2048x2048 2048x5461 4096x11008 --rank 128",
                "--shapes 32x48 --rank 4 --repeats 2",
            ),
            Step(
                "llama 350m",
                "step",
                f"{LLAMA_350M} --batch 32 --rounds 8 --methods full peft ours",
            ),
            Step(
                "llama 350m, compiled",
                "step",
                f"{LLAMA_350M} --batch 32 --rounds 5 --compile --methods full ours",
            ),
        ),
    ),
    Stage(
        "plan",
        "relora plan against the memory allocated",
        (
            Step(
                "llama 350m",
                "plan",
                "--models 350m --precisions bf16 --repeats 1 --override lora.r=128 "
                "data.sequence_length=512 training.per_device_batch_size=16 training.global_batch_size=16",
            ),
            Step(
                "llama 1b",
                "plan",
                "--models 1b --precisions bf16 --repeats 1 --override lora.r=128 "
                "data.sequence_length=512 training.per_device_batch_size=16 training.global_batch_size=16",
            ),
            Step(
                "llama 7b nf4",
                "plan",
                "--models 7b --precisions bf16 --stages low_rank --repeats 1 --override "
                "lora.r=128 lora.base_dtype=nf4 data.sequence_length=512 training.per_device_batch_size=4",
                "--models quickstart --precisions no --stages low_rank --repeats 1 --override lora.base_dtype=nf4",
            ),
        ),
    ),
    Stage(
        "learning",
        "Learning",
        (
            Step(
                "llama 20m",
                "gpu.learning",
                "--size 20m --updates 1500 --picture {out}/learning-20m.png",
                "--size tiny --updates 12",
                minutes=7,
            ),
            Step(
                "llama 60m",
                "gpu.learning",
                "--size 60m --updates 1500 --picture {out}/learning-60m.png",
                minutes=7,
            ),
        ),
    ),
    Stage(
        "checkpoints",
        "Checkpoints and restarts",
        (
            Step(
                "restart, llama 1b",
                "restart",
                f"{LLAMA_1B} --batch 16 --rounds 3 --restarts 3",
            ),
            Step("checkpoint, llama 1b", "checkpoint", f"{LLAMA_1B} --rounds 1", f"{TINY} --rounds 1"),
            Step(
                "restart, llama 7b nf4",
                "restart",
                f"{LLAMA_7B} --batch 4 --base-dtype nf4 --rounds 2 --restarts 2",
                f"{TINY} --base-dtype nf4 --rounds 1 --restarts 1",
            ),
            Step(
                "checkpoint, llama 7b nf4",
                "checkpoint",
                f"{LLAMA_7B} --base-dtype nf4 --rounds 1",
            ),
        ),
    ),
)
