"""Configuration files: where they are found, and the files that they extend."""

import difflib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from relora.config.yaml12 import format_value, parse
from relora.errors import UserError
from relora.files import expand_path

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class ConfigFile:
    """One YAML file: its path, and its content without `extends`."""

    path: Path
    mapping: dict[str, Any]

    def has(self, location: Sequence[int | str]) -> bool:
        """Whether the file sets the key at `location`, such as ("data", "sources", 0, "path")."""
        value: Any = self.mapping
        for part in location:
            is_entry = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if not (is_entry or (isinstance(value, dict) and part in value)):
                return False
            value = value[part]
        return True


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """The path of a configuration file.

    Args:
        name: a path, or the name of a shipped configuration with or without `.yaml`, such as `quickstart`.
        folder: where a relative path starts.

    Returns:
        `folder / name` if there is such a file or no shipped configuration has this name.
    """
    try:
        text = expand_path(str(name))
    except ValueError as error:
        raise UserError([f"{format_value(name)}: {error}"]) from None
    path = folder / text
    if path.is_file() or text.startswith((".", "/")) or text.count("/") > 1:
        return path
    candidates = (shipped / file for shipped in shipped_folders() for file in (text, f"{text}.yaml"))
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def shipped_folders() -> list[Path]:
    """The folders of shipped configurations: in the installed package, or in the repository of a checkout."""
    repository = _PACKAGE.parent
    folders = [_PACKAGE / "configs"]
    if (repository / "pyproject.toml").is_file():  # else the parent is site-packages
        folders.append(repository / "configs")
    return [folder for folder in folders if folder.is_dir()]


def read_files(path: Path) -> list[ConfigFile]:
    """A configuration file and the files that it extends, itself first.

    Raises:
        UserError: a file cannot be read, is no mapping, or extends itself.
    """
    files: list[ConfigFile] = []
    next_path: Path | None = path
    while next_path is not None:
        chain = [*(file.path for file in files), next_path]
        if next_path.resolve() in {file.path.resolve() for file in files}:
            raise UserError([f"{next_path}: extends itself ({' -> '.join(map(str, chain))})"])
        mapping = _read(next_path)
        base = mapping.pop("extends", None)
        files.append(ConfigFile(next_path, mapping))
        if base is not None and not (isinstance(base, str) and base):
            raise UserError(
                [f"{next_path}: extends = {format_value(base)}: must be a path or the name of a configuration"]
            )
        next_path = None if base is None else find_config(base, next_path.parent)
    return files


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings are merged key by key, all other values are replaced."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    """The content of one file, the path in its `model.config` resolved."""
    try:
        mapping = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = [file.stem for folder in shipped_folders() for file in folder.glob("*.yaml")]
        close = difflib.get_close_matches(path.name.removesuffix(".yaml"), shipped, n=1)
        hint = f"; the nearest shipped one is {close[0]}" if close else ""
        raise UserError([f"{path}: there is no such configuration file{hint}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError([f"{path}: cannot be read ({error})"]) from None
    except yaml.YAMLError as error:
        raise UserError([f"{path}: not valid YAML ({' '.join(str(error).split())})"]) from None
    if not isinstance(mapping, dict):
        raise UserError([f"{path}: must be a mapping of sections, not {format_value(mapping)}"])
    mapping.pop("derived", None)  # of a run's own config.yaml: it is derived anew
    section = mapping.get("model")
    if isinstance(section, dict) and isinstance(section.get("config"), str):
        # Relative to here, to its own file, or to the shipped ones.
        shipped_places = [place for configs in shipped_folders() for place in (configs, configs.parent)]
        places = [place / section["config"] for place in (Path(), path.parent, *shipped_places)]
        with suppress(OSError):  # of a name that no file can have, which the check of the key tells
            section["config"] = next((str(place) for place in places if place.is_file()), section["config"])
    return mapping
