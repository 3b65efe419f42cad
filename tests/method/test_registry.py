"""Names in a configuration -> objects."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from relora.method.registry import CUSTOM, resolve, resolve_object

KNOWN: Mapping[str, object] = {"plain": 1, "other": 2}


class Kind:
    """A contract."""


class Own(Kind):
    """A user's class: an object is made of it."""


own = Own()


def test_known_names_and_those_of_a_module() -> None:
    assert resolve("key", "other", KNOWN) == 2
    assert resolve("key", "math:pi", KNOWN) == pytest.approx(3.14159, abs=1e-5)
    assert resolve("key", "os.path:join", KNOWN) is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plan", "key = plan: must be plain, other, or module:attribute; the nearest is plain"),
        ("zzz", "key = zzz: must be plain, other, or module:attribute"),
        ("no_such_module:x", "key = no_such_module:x: cannot be imported (No module named 'no_such_module')"),
        ("math:tau_", "key = math:tau_: cannot be imported (module 'math' has no attribute 'tau_')"),
        ("math:pi:e", "key = math:pi:e: must be plain, other, or module:attribute"),
        ("", "key = : must be plain, other, or module:attribute"),
    ],
)
def test_another_name_is_refused_with_the_rule_and_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        resolve("key", name, KNOWN)


@pytest.mark.parametrize(("name", "fits"), [("a.b:c", True), ("a:b.c", False), ("a b:c", False), ("a:", False)])
def test_the_form_of_a_users_name(name: str, fits: bool) -> None:
    assert (re.fullmatch(CUSTOM, name) is not None) == fits


def test_objects_may_be_given_as_such_as_classes_or_by_name() -> None:
    known = {"own": own}
    for value in ("own", own, f"{__name__}:own"):
        assert resolve_object("key", value, known, Kind) is own
    for value in (Own, f"{__name__}:Own"):
        assert type(resolve_object("key", value, known, Kind)) is Own
    with pytest.raises(ValueError, match=r"key = math:pi: must be a Kind, not float"):
        resolve_object("key", "math:pi", known, Kind)


def test_names_need_no_torch() -> None:
    folder = Path(__file__).parents[2] / "relora" / "method"
    program = "import runpy, sys\nsys.modules['torch'] = None\n"
    program += "".join(f"runpy.run_path({str(folder / name)!r})\n" for name in ("choices.py", "registry.py"))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
