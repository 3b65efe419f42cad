"""What the keys of the configuration are made of: types with their rules, and marks of what a key stands for."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

from relora.files import expand_path
from relora.method.registry import CUSTOM

Count = Annotated[int, Field(ge=1)]
CountFromZero = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
# A path, or the name of something elsewhere that may be a path: ~ and $VARIABLES are expanded.
PathName = Annotated[str, Field(min_length=1), AfterValidator(expand_path)]
NotNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Pair = Annotated[tuple[CountFromZero, CountFromZero], Field(strict=False)]
# The name of a user's own object, `module:attribute`, accepted beside the names of a registry.
CustomName = Annotated[str, Field(pattern=f"^{CUSTOM}$")]
# Keys that change how a run is computed, not its result: they may differ between two starts of the same run.
HOW: JsonDict = {"part_of_the_run": False}
# Keys added after release 0.1: while they have their default they are left out of a run's identity, so that the
# fingerprint of an older run stays the same; so are the values listed as `as_before`, which older runs had unasked.
SINCE_0_2: JsonDict = {"since": "0.2"}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
