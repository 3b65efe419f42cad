"""Names in a configuration -> objects: those that come with the package, or a user's own by `module:attribute`."""

import difflib
import importlib
import re
from collections.abc import Mapping
from typing import TypeVar

# As in an entry point of a package: a module that can be imported, and a name in it.
CUSTOM = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"

T = TypeVar("T")


def resolve(setting: str, name: str, known: Mapping[str, T]) -> T:
    """The object that `setting = name` stands for.

    Args:
        setting: the key of the configuration, or the argument, for the error message.
        name: a key of `known`, or `module:attribute`.

    Raises:
        ValueError: the name is unknown, or the module or the attribute cannot be imported.
    """
    if name in known:
        return known[name]
    if re.fullmatch(CUSTOM, name) is None:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise ValueError(f"{setting} = {name}: must be {', '.join(known)}, or module:attribute{hint}")
    module, _, attribute = name.partition(":")
    try:
        found: T = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{setting} = {name}: cannot be imported ({error})") from error
    return found


def resolve_object(setting: str, value: str | T, known: Mapping[str, T], kind: type[T]) -> T:
    """`value` itself, or the object that its name stands for. A class of one's own is called without arguments.

    Raises:
        ValueError: as in `resolve`, or the result is no `kind`.
    """
    found: object = resolve(setting, value, known) if isinstance(value, str) else value
    if isinstance(found, type) and issubclass(found, kind):
        found = found()
    if not isinstance(found, kind):
        raise ValueError(f"{setting} = {value}: must be a {kind.__name__}, not {type(found).__name__}")
    return found


def object_problems(setting: str, name: str, known: Mapping[str, T], kind: type[T]) -> list[str]:
    """One line if `resolve_object` cannot resolve the name."""
    try:
        resolve_object(setting, name, known, kind)
    except ValueError as error:
        return [str(error)]
    return []
