"""Names that settings may take, without torch: the configuration and the method share them."""

from typing import Literal

BaseDtype = Literal["float32", "bfloat16", "int8", "nf4"]
Bias = Literal["none", "all", "lora_only"]
CacheSpan = Literal["none", "pass", "update"]
Forward = Literal["auto", "merged", "factored"]
FactorOptimizerName = Literal["adamw", "adamw_fused", "adamw_8bit", "product"]
OptimizerName = Literal["adamw", "adamw_fused", "adamw_8bit", "muon"]
ReinitName = Literal["kaiming", "orthogonal", "offset"]
ResetName = Literal["zero", "magnitude", "random", "keep"]
Kernels = Literal["torch", "triton"]
Route = Literal["merged", "factored"]
StageName = Literal["full_rank", "low_rank"]
