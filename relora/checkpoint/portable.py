"""config.json and tokenizer_config.json of an exported model, as transformers 4 and 5 both read them.

transformers 5 has new names for the rotary settings and for the class of a tokenizer. Version 4 refuses the class, and
takes its default for a setting that it does not find: the model would open without a word, and compute something else.
So the old names stand beside the new ones.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
FOUR_AND_FIVE = "transformers 5, or 4.57 if it has the architecture"
FIVE_ALONE = "transformers 5 alone, as version 4 has no names for some settings of this model"
# How the model or the tokenizer was loaded, which is of no interest to whom loads them next.
LOADING = ("is_local", "local_files_only", "backend", "name_or_path", "_from_model_config")


def make_portable(folder: Path, model: PreTrainedModel) -> str:
    """Rewrite the JSON files in `folder`, where transformers 5 has saved `model` and its tokenizer.

    Returns:
        The versions of transformers that read the folder, as a phrase.
    """
    versions = _rewrite_config(folder / CONFIG, type(model.config))
    for path in (folder / GENERATION, folder / TOKENIZER):
        if path.is_file():
            content = {key: value for key, value in read(path).items() if key not in LOADING}
            if content.get("tokenizer_class") == "TokenizersBackend":
                content["tokenizer_class"] = "PreTrainedTokenizerFast"
            if isinstance(content.get("extra_special_tokens"), list):
                content["additional_special_tokens"] = content.pop("extra_special_tokens")
            write(path, content)
    return versions


def _rewrite_config(path: Path, kind: type[PretrainedConfig]) -> str:
    """Add the names of transformers 4 to config.json, if the config that this version reads stays the same."""
    content, before = read(path), kind.from_json_file(path).to_dict()
    older, can_say_all = with_older_names(content)
    can_say_all &= "__float__" not in path.read_text(encoding="utf-8")  # how version 5 alone writes an infinite number
    write(path, older)
    after = kind.from_json_file(path).to_dict()
    if can_say_all and all(key in after and after[key] == value for key, value in before.items()):
        return FOUR_AND_FIVE
    write(path, content)
    return FIVE_ALONE


def with_older_names(settings: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A config's content with the names of transformers 4 added; and whether these say all that the new ones do.

    Configs inside of it, such as a text_config, are rewritten likewise.
    """
    older, can_say_all = dict(settings), True
    for key, value in settings.items():
        if isinstance(value, dict) and key != "rope_parameters":
            older[key], inside = with_older_names(value)
            can_say_all &= inside
    if "dtype" in settings:
        older["torch_dtype"] = settings["dtype"]
    rotary = settings.get("rope_parameters")
    if not rotary:
        return older, can_say_all
    by_layer = any(isinstance(value, dict) for value in rotary.values())
    if by_layer:
        # Two families of version 4 scale the positions of some of their layers only; Gemma 3 has a second base too.
        sliding, rotary = rotary.get("sliding_attention"), rotary.get("full_attention")
        family = str(settings.get("model_type"))
        if not family.startswith(("gemma3", "olmo3")) or not (sliding and rotary):
            return older, False
        if family.startswith("gemma3"):
            older["rope_local_base_freq"] = sliding["rope_theta"]
        else:
            can_say_all &= sliding["rope_theta"] == rotary["rope_theta"]
        can_say_all &= sliding.get("rope_type") == "default"
    return older | _older_rotary_names(rotary, str(settings.get("model_type"))), can_say_all


def _older_rotary_names(rotary: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The rotary settings of one kind of layer, as transformers 4 names them."""
    theta, part = ("rotary_emb_base", "rotary_pct") if model_type.startswith("gpt_neox") else ("rope_theta", "")
    older: dict[str, Any] = {}
    if "rope_theta" in rotary:
        older[theta] = rotary["rope_theta"]
    if "partial_rotary_factor" in rotary:
        older[part or "partial_rotary_factor"] = rotary["partial_rotary_factor"]
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return older


def read(path: Path) -> dict[str, Any]:
    """The JSON mapping in a file that a library has just written."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file that is not published yet, in the form that transformers gives it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
