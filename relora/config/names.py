"""The key that an unknown one was probably meant to be: by its name in other programs, or by its spelling."""

import difflib
import re
from collections.abc import Iterable

# Settings of transformers' TrainingArguments, PEFT's LoraConfig, trl, axolotl and their like -> ours.
ELSEWHERE = {
    "adam_beta_1": "optim.adam_beta1",
    "adam_beta_2": "optim.adam_beta2",
    "alpha": "lora.lora_alpha",
    "attn_impl": "model.attn_implementation",
    "auto_find_batch_size": "training.per_device_batch_size",
    "base_model": "model.name_or_path",
    "base_model_name_or_path": "model.name_or_path",
    "batch_size": "training.global_batch_size",
    "beta1": "optim.adam_beta1",
    "beta2": "optim.adam_beta2",
    "bf16": "training.mixed_precision",
    "block_size": "data.sequence_length",
    "checkpoint_every": "training.save_steps",
    "checkpointing_steps": "training.save_steps",
    "compile": "model.torch_compile",
    "config_name": "model.config",
    "context_length": "data.sequence_length",
    "cutoff_len": "data.sequence_length",
    "cycle_length": "relora.restart_every",
    "dataloader_num_workers": "data.num_workers",
    "dataset": "data.sources[].path",
    "dataset_config_name": "data.sources[].name",
    "dataset_name": "data.sources[].path",
    "dataset_num_proc": "data.num_proc",
    "dataset_path": "data.sources[].path",
    "dataset_text_field": "data.text_field",
    "datasets": "data.sources",
    "dropout": "lora.lora_dropout",
    "dtype": "training.mixed_precision",
    "eps": "optim.adam_epsilon",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "evaluation_steps": "training.eval_steps",
    "flash_attention": "model.attn_implementation",
    "gradient_clip_val": "optim.max_grad_norm",
    "gradient_clipping": "optim.max_grad_norm",
    "grad_clip": "optim.max_grad_norm",
    "iterations": "training.max_steps",
    "learning_rate_warmup_steps": "schedule.warmup_steps",
    "load_in_4bit": "lora.base_dtype",
    "load_in_8bit": "lora.base_dtype",
    "log_steps": "training.logging_steps",
    "log_with": "training.report_to",
    "lora_bias": "lora.bias",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "lr": "optim.learning_rate",
    "max_iters": "training.max_steps",
    "max_length": "data.sequence_length",
    "max_seq_len": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "max_train_steps": "training.max_steps",
    "micro_batch_size": "training.per_device_batch_size",
    "min_lr": "schedule.min_lr_ratio",
    "min_lr_rate": "schedule.min_lr_ratio",
    "model_id": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_path": "model.name_or_path",
    "n_gpu": "training.num_processes",
    "num_gpus": "training.num_processes",
    "num_steps": "training.max_steps",
    "num_train_steps": "training.max_steps",
    "num_training_steps": "training.max_steps",
    "num_warmup_steps": "schedule.warmup_steps",
    "optim": "optim.name",
    "optimizer": "optim.name",
    "out_dir": "output_dir",
    "per_device_train_batch_size": "training.per_device_batch_size",
    "preprocessing_num_workers": "data.num_proc",
    "quantization": "lora.base_dtype",
    "r": "lora.r",
    "rank": "lora.r",
    "relora_prune_ratio": "relora.prune_ratio",
    "relora_steps": "relora.restart_every",
    "reset_optimizer": "relora.optimizer_reset",
    "restart_steps": "relora.restart_every",
    "save_every": "training.save_steps",
    "save_limit": "training.save_total_limit",
    "scheduler_warmup_steps": "schedule.warmup_steps",
    "seq_len": "data.sequence_length",
    "seq_length": "data.sequence_length",
    "steps": "training.max_steps",
    "text_column": "data.text_field",
    "tokenizer_name": "data.tokenizer",
    "tokenizer_name_or_path": "data.tokenizer",
    "total_batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "train_file": "data.sources[].path",
    "train_steps": "training.max_steps",
    "use_liger_kernel": "model.liger_kernel",
    "val_size": "data.eval_fraction",
    "validation_split_percentage": "data.eval_fraction",
    "wd": "optim.weight_decay",
}
# What is no setting here, and the reason.
NOT_HERE = {
    "gradient_accumulation": "it follows from training.global_batch_size and per_device_batch_size",
    "gradient_accumulation_steps": "it follows from training.global_batch_size and per_device_batch_size",
    "num_train_epochs": "the length of a run is training.max_steps",
    "num_epochs": "the length of a run is training.max_steps",
    "epochs": "the length of a run is training.max_steps",
    "max_epochs": "the length of a run is training.max_steps",
    "warmup_ratio": "warm-up is counted in updates, schedule.warmup_steps",
    "lr_scheduler_type": "the schedule is a cosine with restarts; schedule.min_lr_ratio is its end",
    "lr_scheduler_kwargs": "the schedule is a cosine with restarts; schedule.min_lr_ratio is its end",
    "lr_scheduler": "the schedule is a cosine with restarts; schedule.min_lr_ratio is its end",
    "fp16": "training.mixed_precision is no or bf16",
    "fp32": "training.mixed_precision is no or bf16",
    "tf32": "training.mixed_precision is no or bf16",
    "fsdp": "the launcher chooses it: accelerate launch --config_file launch/fsdp2.yaml",
    "fsdp_config": "the launcher chooses it: accelerate launch --config_file launch/fsdp2.yaml",
    "deepspeed": "the launcher chooses it: accelerate launch --config_file launch/zero2.yaml",
    "local_rank": "the launcher sets it",
    "ddp_find_unused_parameters": "DDP sets it itself",
    "packing": "documents are always packed; data.document_mask keeps them apart",
    "group_by_length": "documents are packed into samples of one length",
    "eval_accumulation_steps": "an evaluation sums losses and stores no outputs",
    "eval_strategy": "training.eval_steps says how often",
    "evaluation_strategy": "training.eval_steps says how often",
    "save_strategy": "training.save_steps says how often",
    "logging_strategy": "training.logging_steps says how often",
    "logging_dir": "TensorBoard's files are in output_dir",
    "logging_first_step": "training.logging_steps says how often",
    "save_safetensors": "nothing else is written",
    "overwrite_output_dir": "a run is resumed and never overwritten; choose another output_dir",
    "resume_from_checkpoint": "the same command resumes from the newest checkpoint",
    "load_best_model_at_end": "the final model is the last one",
    "push_to_hub": "upload RUN/final with `hf upload`",
    "hub_model_id": "upload RUN/final with `hf upload`",
    "do_train": "relora train, eval and prepare are commands",
    "do_eval": "relora train, eval and prepare are commands",
    "run_name": "a run is named by its output_dir",
    "data_seed": "seed is the seed of every random draw",
    "full_determinism": "seed is the seed of every random draw",
    "task_type": "training.task is the task",
    "inference_mode": "a run trains; relora export merges the factors",
    "peft_type": "training.method is relora, lora or full",
    "init_lora_weights": "relora.reinit is how factors are drawn",
    "corda_config": "relora.reinit is how factors are drawn",
    "eva_config": "relora.reinit is how factors are drawn",
    "loftq_config": "relora.reinit is how factors are drawn; relora.carry_residual starts from the quantization error",
    "layers_to_transform": "lora.target_modules may be a regex of whole names",
    "layers_pattern": "lora.target_modules may be a regex of whole names",
    "exclude_modules": "lora.target_modules may be a regex of whole names",
    "rank_pattern": "one rank holds for all layers, lora.r",
    "alpha_pattern": "one scale holds for all layers, lora.lora_alpha",
    "use_dora": "factors are those of LoRA",
    "use_qalora": "factors are those of LoRA",
    "kasa_config": "factors are those of LoRA",
    "target_parameters": "factors belong to linear layers; lora.modules_to_save trains parameters in full",
    "fan_in_fan_out": "the kind of a layer says it",
    "neftune_noise_alpha": "no noise is added",
    "label_smoothing_factor": "the loss is cross-entropy",
    "use_cpu": "the launcher chooses the device: accelerate launch --cpu",
    "no_cuda": "the launcher chooses the device: accelerate launch --cpu",
}


def pattern_of(key: str) -> str:
    """`data.sources[3].path` -> `data.sources[].path`."""
    return re.sub(r"\[\d+\]", "[]", key)


def meant_by(key: str, known: Iterable[str]) -> str:
    """What to do about an unknown key, such as `the nearest is optim.learning_rate`.

    Args:
        known: every key, sections left out.
    """
    section, _, name = pattern_of(key).rpartition(".")
    keys = [*dict.fromkeys(rule.split(".")[0] for rule in known), *known]
    siblings = {other.rpartition(".")[2]: other for other in keys if other.rpartition(".")[0] == section}
    same = [other for other in keys if other.rpartition(".")[2] == name]
    elsewhere = ELSEWHERE.get(name)
    nearest = elsewhere if elsewhere is not None and not set(same) & set(known) else (*same, None)[0]
    nearest = nearest or _similar(name, siblings, keys)
    if not same and name in NOT_HERE:
        return f"not a setting here: {NOT_HERE[name]}"
    return f"the nearest is {nearest}" if nearest else f"known here are {', '.join(siblings)}"


def _similar(name: str, siblings: dict[str, str], keys: Iterable[str]) -> str | None:
    """The key that is spelt most like `name`: one of the same section if there is any, else of all; or None."""
    # Short names are left out: anything is similar to `r`.
    long = {other.rpartition(".")[2]: other for other in keys if len(other.rpartition(".")[2]) > 2}
    for names, cutoff in ((siblings, 0.6), (long, 0.7)):
        hits = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        if hits:
            return names[hits[0]]
    return None
