"""Ways to damage a file, and the values of a JSON file changed one by one. Each changes what lies at one path."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]
FEW = 2  # of the entries of a mapping with many of the same kind, so many are changed


def truncate(path: Path) -> None:
    """The second half is lost, as after a crash of a machine that had not written it yet."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    """The size is right and the content zeros, as some file systems leave it."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path) -> None:
    path.unlink()


def put_folder(path: Path) -> None:
    """A folder in place of the file."""
    path.unlink()
    path.mkdir()


def put_link(path: Path) -> None:
    """A link to nothing in place of the file."""
    path.unlink()
    path.symlink_to("nowhere")


def flip(place: float, bit: int = 0) -> Damage:
    """Flip one bit at `place`, a part of the file's length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(int(place * len(content)), len(content) - 1)] ^= 1 << bit
        # Into the very file: the names that hard links gave it share the damage.
        with path.open("r+b") as file:
            file.write(content)

    return damage


def swap(other: Path) -> Damage:
    """The content of `other` in place of the file's own, in a file of its own."""

    def damage(path: Path) -> None:
        path.unlink()
        shutil.copy(other, path)

    return damage


FILE_DAMAGES: dict[str, Damage] = {
    "truncated": truncate,
    "emptied": empty,
    "zeroed": zero,
    "deleted": delete,
    "a folder instead": put_folder,
    "a link to nothing": put_link,
    "flipped near the start": flip(0.01, 2),
    "flipped in the middle": flip(0.5),
    "flipped near the end": flip(0.99, 5),
}


def json_edits(path: Path, load: Callable[[str], Any] = json.loads) -> Iterator[tuple[str, str, Any]]:
    """Every field of a JSON file, one at a time: left out, of another value, of another type.

    Args:
        load: the reader, of YAML perhaps.

    Yields:
        The field, how it is changed, and the whole value of the file with that change.
    """
    content = load(path.read_text())
    yield "an unknown field", "added", content | {"unknown": 1}
    for place in list(_places(content)):
        value = content
        for key in place:
            value = value[key]
        for how, new in _others(value):
            changed = copy.deepcopy(content)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            if how == "left out":
                del inner[place[-1]]
            else:
                inner[place[-1]] = new
            yield ".".join(map(str, place)), how, changed


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields; of a mapping with many entries the first and the last ones."""
    if place:
        yield place
    if isinstance(value, dict):
        keys = list(value)
        kept = keys if len(place) == 0 or len(keys) < 12 else [*keys[:FEW], *keys[-FEW:]]
        for key in kept:
            yield from _places(value[key], (*place, key))


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    """What a field may be instead."""
    yield "left out", None
    yield "null", None
    if isinstance(value, bool):
        yield "negated", not value
    elif isinstance(value, int | float):
        yield from (("+ 4", value + 4), ("- 1", value - 1), ("times 10", value * 10), ("a string", str(value)))
    elif isinstance(value, str):
        yield from (("another string", value[:-1] + ("0" if value[-1:] != "0" else "1")), ("a number", 7))
    elif isinstance(value, dict):
        yield from (("emptied", {}), ("a list", list(value)))


def bit_flips(path: Path, count: int, seed: int) -> Iterator[tuple[str, Damage]]:
    """Single bits of a file, drawn by `seed`."""
    rng = random.Random(seed)
    size = path.stat().st_size
    for _ in range(count):
        byte, bit = rng.randrange(size), rng.randrange(8)
        yield f"bit {bit} of byte {byte}", flip((byte + 0.5) / size, bit)
