"""The configuration: every key with its type, default, rule and meaning.

Names follow Hugging Face (transformers, PEFT, datasets) where it has one. Rules that join several keys are in
`rules.py`. `docs/config.md` is generated from these classes by `python -m relora.config`.
"""

from typing import Annotated, Literal

from pydantic import Field

from relora.config.field_types import (
    HOW,
    SINCE_0_2,
    Beta,
    Count,
    CountFromZero,
    CustomName,
    Name,
    NotNegative,
    PathName,
    Section,
)
from relora.config.input_sections import DataSection, ModelSection
from relora.method.choices import (
    BaseDtype,
    Bias,
    FactorOptimizerName,
    Forward,
    Kernels,
    OptimizerName,
    ReinitName,
    ResetName,
)


class LoraSection(Section):
    r: Count = Field(128, description="rank of the update")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(32, description="scale = lora_alpha / r")
    use_rslora: bool = Field(False, description="scale = lora_alpha / sqrt(r) instead")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout on the input of A")
    bias: Bias = Field("none", description="biases that train in full; lora_only: those of wrapped layers")
    target_modules: Name | Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] = Field(
        "all-linear",
        description="PEFT's rules: all-linear (without heads and layers that cannot be wrapped; a run lists them), "
        "a list of suffixes, or a regex",
    )
    modules_to_save: Literal["auto"] | Annotated[tuple[Name, ...], Field(strict=False)] | None = Field(
        "auto",
        description="modules that train in full; auto: none but the head of a classifier when continuing a pretrained "
        "model, from scratch every parameter that is not a wrapped weight",
    )
    base_dtype: BaseDtype = Field(
        "float32",
        description="storage of the frozen weights; with any but float32 an exact float32 master receives the merges "
        "(int8 and nf4: relora[quantization])",
    )
    master: Literal["host", "disk"] = Field(
        "host",
        description="where the masters are stored: in host memory, or in memory-mapped files in output_dir",
        json_schema_extra=HOW,
    )
    forward: Forward = Field(
        "auto",
        description="merged: one product with W + s B A (base_dtype float32, no dropout); factored: x A^T B^T beside "
        "x W^T; auto: whichever needs fewer FLOPs",
        json_schema_extra=HOW,
    )
    keep_merged: bool = Field(
        True,
        description="cache W + s B A of the merged route from the forward pass of an update to its end, a further "
        "copy of these weights (`relora plan` shows it); not under FSDP2, DeepSpeed or torch_compile",
        json_schema_extra=HOW,
    )
    kernels: Kernels = Field(
        "torch",
        description="triton: x W^T + s (x A^T) B^T by one fused kernel, W + s B A by another (a GPU, no dropout; "
        "`relora[triton]`); not measured on a GPU yet, so it is off",
        json_schema_extra=HOW,
    )


class ReloraSection(Section):
    restart_every: Count | None = Field(2000, description="updates between restarts; null: no restarts")
    warm_start_steps: CountFromZero = Field(0, description="full-rank updates before the first low-rank one")
    reinit: ReinitName | CustomName = Field(
        "kaiming",
        description="new factors: kaiming and orthogonal draw A, and B is zero; offset draws both, and s B A is taken "
        "out of W; or a `relora.method.reinit.Reinit`",
    )
    offset_norm: Annotated[float, Field(gt=0)] = Field(
        4.0, description="reinit offset: |s B A|_2 / peak learning rate of the factors", json_schema_extra=SINCE_0_2
    )
    optimizer_reset: ResetName | CustomName = Field(
        "zero",
        description="reset of the optimizer state of A and B at a restart; or a `relora.method.reset.Reset`",
    )
    prune_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="fraction of the moments that magnitude and random set to zero"
    )
    carry_residual: bool = Field(
        False,
        description="int8 and nf4: new factors start as the best rank-r approximation of the quantization error",
    )
    sync: Literal["step", "restart"] = Field(
        "step",
        description="step: average gradients at every update; restart: each process trains its own factors, averaged "
        "at restarts only (DDP only)",
    )
    outer_learning_rate: Annotated[float, Field(gt=0)] = Field(
        1.0, description="sync restart: factor on the mean of the processes' updates"
    )
    outer_momentum: Beta = Field(0.0, description="sync restart: Nesterov momentum of the mean updates")


class OptimSection(Section):
    name: OptimizerName | CustomName = Field(
        "adamw_fused",
        description="adamw_fused: torch's fused AdamW, which a run never waits for; adamw: torch's choice of kernel; "
        "adamw_8bit: bitsandbytes'; muon: torch's for hidden matrices trained in full, adamw_fused for the rest (these "
        "two: one process, DDP); or a `relora.method.optimizer.OptimizerKind`",
    )
    factors: FactorOptimizerName | CustomName | None = Field(
        None,
        description="of A and B; product: steps in B A, |step of W|_2 <= the rate (one process, DDP); null: optim.name",
        json_schema_extra=SINCE_0_2,
    )
    learning_rate: NotNegative = Field(1e-3, description="peak learning rate")
    factors_learning_rate: NotNegative | None = Field(
        None, description="peak learning rate of A and B; null: learning_rate", json_schema_extra=SINCE_0_2
    )
    muon_learning_rate: NotNegative = Field(0.02, description="peak rate of muon", json_schema_extra=SINCE_0_2)
    warm_start_learning_rate: NotNegative | None = Field(None, description="in the warm start; null: learning_rate")
    adam_beta1: Beta = Field(0.9, description="decay of the first moment")
    adam_beta2: Beta = Field(0.95, description="decay of the second moment")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NotNegative = Field(0.0, description="decoupled weight decay, except on biases and norms")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="clip the gradient to this norm; null: no clipping"
    )


class ScheduleSection(Section):
    warmup_steps: CountFromZero = Field(500, description="updates of linear warm-up at the start")
    restart_warmup_steps: CountFromZero = Field(100, description="updates of re-warm-up after a restart")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="final rate / peak rate")


class TrainingSection(Section):
    method: Literal["relora", "lora", "full"] = Field(
        "relora", description="lora: no restarts; full: no low-rank stage"
    )
    task: Literal["causal_lm"] | CustomName = Field(
        "causal_lm",
        description="inputs, labels and loss; causal_lm: predict the next token; or a `relora.model.tasks.Task`",
        json_schema_extra=SINCE_0_2,
    )
    engine: Literal["auto"] | CustomName = Field(
        "auto",
        description="auto: DDP, FSDP2 or DeepSpeed, as launched; or a function (config, world, task) -> Engine",
        json_schema_extra=HOW,
    )
    trainable: Name | None = Field(None, description="method full: a regex of the names of the parameters to train")
    max_steps: Count = Field(20000, description="number of updates, warm start included")
    global_batch_size: Count = Field(512, description="samples per update, whatever the number of processes")
    per_device_batch_size: Count = Field(
        16, description="samples per forward pass; gradient accumulation is derived", json_schema_extra=HOW
    )
    per_device_eval_batch_size: Count | None = Field(
        None, description="null: per_device_batch_size", json_schema_extra=HOW
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "bf16", description="bf16: fp32 parameters, bf16 autocast", json_schema_extra=HOW
    )
    sync_each_batch: bool = Field(
        True,
        description="FSDP2: reduce gradients after each micro-batch; false: once an update, unsharded until then",
        json_schema_extra=HOW,
    )
    num_processes: Count | None = Field(
        None, description="required number of processes; null: any", json_schema_extra=HOW
    )
    eval_steps: Count = Field(500, description="updates between evaluations", json_schema_extra=HOW)
    save_steps: Count = Field(1000, description="updates between checkpoints", json_schema_extra=HOW)
    save_total_limit: Count | None = Field(
        3, description="number of newest checkpoints kept; null: all", json_schema_extra=HOW
    )
    async_save: bool = Field(
        True,
        description="write checkpoints while training goes on, from copies in host memory; false: train on afterwards, "
        "with one tensor at a time in host memory",
        json_schema_extra=HOW,
    )
    logging_steps: Count = Field(10, description="updates between lines of metrics", json_schema_extra=HOW)
    max_hours: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="stop with a checkpoint before the training process is so old, as after a signal; null: no limit",
        json_schema_extra=HOW,
    )
    timeout_minutes: Annotated[float, Field(gt=0)] | None = Field(
        60,
        description="end the run, with the stacks of all threads, when no batch, tensor or file has moved for so long; "
        "null: never",
        json_schema_extra=HOW,
    )
    report_to: Annotated[tuple[Literal["tensorboard"] | CustomName, ...], Field(strict=False)] = Field(
        ("tensorboard",),
        description="where metrics go beside metrics.jsonl and the progress bar; or a `relora.tracking.tracker.Sink`",
        json_schema_extra=HOW,
    )
    peak_tflops: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="peak of one device in TFLOP/s, for `mfu` in the metrics; null: by the name of the GPU, if known",
        json_schema_extra=HOW,
    )
    on_spike: Literal["warn", "skip", "rollback"] = Field(
        "warn",
        description="an update whose loss is far above those before it; skip: it is not applied; rollback: its batch "
        "and the nine before it are left out, and the run goes back to the checkpoint before them",
        json_schema_extra=SINCE_0_2,
    )
    probe_steps: CountFromZero = Field(
        0,
        description="number of updates after a restart at which the loss on one fixed held-out batch is logged",
        json_schema_extra=HOW,
    )


class Config(Section):
    output_dir: PathName = Field(description="the run folder", json_schema_extra=HOW)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of every random draw")
    hub_timeout_s: Annotated[float, Field(gt=0, le=3600)] = Field(
        15.0,
        description="seconds that the Hugging Face hub may take to answer; a download may take longer while bytes come",
        json_schema_extra=HOW,
    )
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    relora: ReloraSection = ReloraSection()
    optim: OptimSection = OptimSection()
    schedule: ScheduleSection = ScheduleSection()
    training: TrainingSection = TrainingSection()
