"""Who may import whom, read from the sources; and the rules of the tree that a reader could only check by hand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("__init__.py", "demo", "flux_runtime", "nodes", "web")  # benchmarks run the oracle beside us, as tests do
LONGEST_FILE = 400

RUNTIME = {"torch", "numpy", "PIL", "safetensors", "huggingface_hub", "transformers"}
LATE = {"huggingface_hub", "transformers"}  # imported inside functions: they take seconds
COMFYUI = {"comfy", "comfy_execution", "execution", "folder_paths", "server"}
PROVIDES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "yaml": "pyyaml",
    "comfyui_frontend_package": "comfyui-frontend-package",
}


@dataclass(frozen=True)
class Import:
    """One import statement: `module` is dotted from the root of the repository where `ours`."""

    file: str
    line: int
    module: str
    ours: bool
    inside_function: bool
    optional: bool  # in a `try` that goes on without it

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def python_files(*parts: str) -> list[Path]:
    """The .py files of these folders and files of the tree."""
    paths = [ROOT / part for part in parts]
    return sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))


@cache
def parsed(file: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"))


def read_imports(file: Path, tree: ast.Module) -> Iterator[Import]:
    """All imports of a file of the package; relative ones resolved, imports for type checkers alone left out."""
    package = file.relative_to(ROOT).parent.parts

    def visit(node: ast.AST, inside: bool, optional: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        for name, ours in dict.fromkeys(imported(node, package)):
            yield Import(file.relative_to(ROOT).as_posix(), node.lineno, name, ours, inside, optional)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        optional = optional or (isinstance(node, ast.Try) and "ImportError" in caught(node))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, optional)

    yield from visit(tree, False, False)


def imported(node: ast.AST, package: tuple[str, ...]) -> list[tuple[str, bool]]:
    """The modules that a statement imports, each with whether it is ours."""
    if isinstance(node, ast.Import):
        return [(alias.name, False) for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level:
        base = package[: len(package) - node.level + 1]
        return [(".".join((*base, *(node.module or alias.name).split("."))), True) for alias in node.names]
    return [(node.module or "", False)] if isinstance(node, ast.ImportFrom) else []


def caught(node: ast.Try) -> set[str]:
    """The exceptions a `try` handles, by name; both that a missing module raises count as ImportError."""
    names = {
        name.id for handler in node.handlers for name in ast.walk(handler.type or handler) if isinstance(name, ast.Name)
    }
    return names | ({"ImportError"} if "ModuleNotFoundError" in names else set())


def imports_of(*parts: str) -> list[Import]:
    """All imports below these parts of the tree."""
    return [found for file in python_files(*parts) for found in read_imports(file, parsed(file))]


def foreign(found: Import) -> bool:
    """Whether this is somebody else's library, and needed."""
    return not found.ours and not found.optional and found.top not in sys.stdlib_module_names


def told(faults: list[Import]) -> str:
    return "\n".join(str(fault) for fault in faults)


def test_the_reader_sees_what_it_must() -> None:
    text = (
        "import torch\nfrom ...nodes.schema import node\nfrom . import errors\n"
        "def f():\n    import transformers.models\n"
        "if TYPE_CHECKING:\n    import diffusers\n"
        "try:\n    import psutil\nexcept ModuleNotFoundError:\n    pass\n"
    )
    found = list(read_imports(ROOT / "flux_runtime" / "model" / "x.py", ast.parse(text)))
    assert [(i.module, i.ours, i.inside_function, i.optional) for i in found] == [
        ("torch", False, False, False),
        ("nodes.schema", True, False, False),
        ("flux_runtime.model.errors", True, False, False),
        ("transformers.models", False, True, False),
        ("psutil", False, False, True),
    ]


def test_the_runtime_stands_on_its_own() -> None:
    faults = [
        i
        for i in imports_of("flux_runtime")
        if (i.ours and i.top != "flux_runtime")
        or (foreign(i) and i.top not in RUNTIME)
        or (i.top in LATE and not i.ours and not i.inside_function)
    ]
    assert not faults, told(faults)


def test_the_nodes_know_the_runtime_and_nothing_of_the_host() -> None:
    found = imports_of("nodes", "__init__.py")
    faults = [i for i in found if i.ours and i.top not in ("nodes", "flux_runtime", "__init__")]
    faults += [i for i in found if foreign(i) and i.top not in RUNTIME | COMFYUI]
    faults += [i for i in found if i.top in COMFYUI | LATE and not i.ours and not i.inside_function]
    assert not faults, told(faults)


def test_only_the_nodes_speak_to_comfyui() -> None:
    faults = [i for i in imports_of("flux_runtime", "web", "demo") if i.top in COMFYUI | {"nodes"} and not i.ours]
    assert not faults, told(faults)


def test_the_demo_trains_on_the_runtime_alone() -> None:
    faults = [i for i in imports_of("demo") if i.ours and i.top not in ("demo", "flux_runtime")]
    assert not faults, told(faults)


def test_the_model_knows_nothing_of_what_acts_on_it() -> None:
    outside = ("weights", "quant", "lora", "memory", "speed", "sampling", "recipes", "generate")
    faults = [i for i in imports_of("flux_runtime/model") if i.ours and _in(i, outside)]
    assert not faults, told(faults)


def test_the_loop_knows_nothing_of_the_model() -> None:
    faults = [i for i in imports_of("flux_runtime/sampling.py") if i.ours and _in(i, ("model", "weights", "text"))]
    assert not faults, told(faults)


def _in(found: Import, parts: tuple[str, ...]) -> bool:
    """Whether this is one of these parts of the runtime."""
    return any(
        found.module == f"flux_runtime.{part}" or found.module.startswith(f"flux_runtime.{part}.") for part in parts
    )


def test_inside_the_package_imports_are_relative() -> None:
    """ComfyUI loads the folder under a name of its own, beside a foreign top-level `nodes`."""
    own = {"fluxcanvas", *(path.name for path in ROOT.iterdir() if path.is_dir())}
    faults = [i for i in imports_of(*SOURCES) if not i.ours and i.top in own and i.top not in sys.stdlib_module_names]
    assert not faults, told(faults)


def test_the_oracle_is_for_tests_alone() -> None:
    faults = [i for i in imports_of(*SOURCES) if i.top in ("diffusers", "pytest", "torchvision", "torchaudio")]
    assert not faults, told(faults)


def test_every_library_is_declared(checkout: Path) -> None:
    """A library that only happens to be installed here would be missing at the user's."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shipped, extras = _names(project["dependencies"]), project["optional-dependencies"]
    host, test = _names(extras["host"]), _names(extras["test"])

    def missing(found: list[Import], declared: set[str]) -> list[Import]:
        return [
            i for i in found if foreign(i) and i.top not in COMFYUI and _package(i) not in declared | {"fluxcanvas"}
        ]

    faults = missing(imports_of("flux_runtime", "nodes", "demo"), shipped)
    faults += missing(imports_of("web"), shipped | host)
    faults += missing(imports_of("tests"), shipped | host | test)
    assert not faults, told(faults)


def _names(requirements: list[str]) -> set[str]:
    """The bare names of requirements, in lower case."""
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def _package(found: Import) -> str:
    return PROVIDES.get(found.top, found.top).lower().replace("_", "-")


def test_there_is_one_loop() -> None:
    loops = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in python_files(*SOURCES)
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef) and node.name == "denoise"
    ]
    assert len(loops) == 1, loops


def test_no_file_is_too_long_to_read() -> None:
    long = {
        file.relative_to(ROOT).as_posix(): lines
        for file in [*python_files(*SOURCES, "tests"), ROOT / "fluxcanvas"]
        if (lines := file.read_text(encoding="utf-8").count("\n")) > LONGEST_FILE
    }
    assert not long


def test_ruff_finds_nothing(checkout: Path) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
