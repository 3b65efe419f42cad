"""The house: who may import whom, and what `import relora` needs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import relora

PACKAGE = Path(__file__).parents[1] / "relora"
# Each room imports only rooms further down.
ORDER = (
    "cli",
    "commands",
    "forecast",
    "train",
    "tracking",
    "checkpoint",
    "engines",
    "model",
    "data",
    "config",
    "hub",
    "files",
    "errors",
    "text",
    "method",
)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "relora"


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "relora":
            yield from (f"relora.{alias.name}" for alias in node.names) if node.module == "relora" else (node.module,)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "relora")


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = room("relora." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for module in imports(path):
        other = room(module)
        if other in ("relora", "__version__"):
            continue
        assert ORDER.index(own) <= ORDER.index(other), f"{own} imports {module}"


def test_every_room_has_its_place() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(ORDER)


def test_only_engines_know_accelerate() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "accelerate" in path.read_text() and path.parent.name != "engines":
            modules = {
                alias.name if isinstance(node, ast.Import) else node.module or ""
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            assert not any(module.split(".")[0] in ("accelerate", "deepspeed") for module in modules), path


def test_import_relora_needs_little() -> None:
    optional = ["pydantic", "tensorboard", "matplotlib", "deepspeed", "peft", "pytest"]
    program = (
        f"import sys\nfor name in {optional}: sys.modules[name] = None\n"
        "import relora\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(relora.__all__) <= set(dir(relora))\n"
        "assert all(getattr(relora, name).__name__ == name for name in relora.__all__)\n"
        "from relora import *\n"
        "assert restart is relora.restart\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    with pytest.raises(AttributeError, match="module 'relora' has no attribute 'inject'"):
        relora.inject  # noqa: B018


def test_an_optional_engine_is_known_to_few_files() -> None:
    names = re.compile(r"relora\.sync|\.sync [=!]=|local_sgd|LocalSGD|outer_(momentum|learning)")
    files = [path.name for path in PACKAGE.rglob("*.py") if names.search(path.read_text())]
    assert "local_sgd.py" in files
    assert len(files) <= 8, files


def test_the_method_knows_no_engine() -> None:
    marks = re.compile(r"ds_id|_hp_mapping|\bplacements\b|device_mesh|DTensor\b(?=\()|torch\.distributed|accelerate")
    found = {path.name: marks.findall(path.read_text()) for path in (PACKAGE / "method").rglob("*.py")}
    assert not any(found.values()), found
