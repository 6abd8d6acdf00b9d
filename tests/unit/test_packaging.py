"""The package as it is installed: everything in it, nothing else, and it works outside the repository."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml takes Python 3.11")

NOT_PACKAGED = {"tests", "benchmarks", "docs", "build", "dist", "custom_nodes", "models", "input", "output", "user"}
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests")


@pytest.fixture(scope="module")
def pyproject(checkout: Path) -> dict:
    return tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))


def folders_with_python(checkout: Path) -> set[Path]:
    """Every folder of the tree that holds Python files of the product, relative to the root."""
    found = {file.parent.relative_to(checkout) for file in checkout.rglob("*.py")}
    hidden = {folder for folder in found if any(part.startswith((".", "__")) for part in folder.parts)}
    return {folder for folder in found - hidden if not folder.parts or folder.parts[0] not in NOT_PACKAGED}


def test_every_package_is_listed(checkout: Path, pyproject: dict) -> None:
    """An editable install hides a forgotten one; the wheel would lack it."""
    there = {".".join(("fluxcanvas", *folder.parts)) for folder in folders_with_python(checkout)}
    assert there == set(pyproject["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init(checkout: Path) -> None:
    assert [
        folder for folder in folders_with_python(checkout) if not (checkout / folder / "__init__.py").is_file()
    ] == []


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves files behind, and old ones could end up in it."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "checkout"
    top = os.fspath(checkout)
    with_data = {"models", "input", "output", "temp", "user"}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return NOT_COPIED(folder, names) | (with_data & set(names) if os.fspath(folder) == top else set())

    shutil.copytree(checkout, copy, ignore=ignore)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(place),
    ]
    result = subprocess.run([*command, str(copy)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """What is in the wheel, without its own metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def tracked(checkout: Path, *patterns: str) -> set[str]:
    """The files of the tree that match, as the wheel names them."""
    files = (path for pattern in patterns for path in checkout.glob(pattern) if path.is_file())
    return {f"fluxcanvas/{path.relative_to(checkout).as_posix()}" for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_module_and_all_data(checkout: Path, names: set[str]) -> None:
    modules = {
        f"fluxcanvas/{file.relative_to(checkout).as_posix()}"
        for folder in folders_with_python(checkout)
        for file in (checkout / folder).glob("*.py")
    }
    patterns = ("demo/weights/**/*", "demo/loras/*", "demo/judge.safetensors", "web/js/**/*", "workflows/**/*")
    data = tracked(checkout, *patterns)
    assert any(name.endswith(".safetensors") for name in data)
    assert any(name.startswith("fluxcanvas/workflows/api/") for name in data)
    assert modules | data <= names, sorted((modules | data) - names)


def test_the_wheel_holds_nothing_else(names: set[str]) -> None:
    allowed = (
        "fluxcanvas/*.py",
        "fluxcanvas/requirements.txt",
        "fluxcanvas/demo/weights/*",
        "fluxcanvas/demo/loras/*",
        "fluxcanvas/demo/judge.safetensors",
        "fluxcanvas/web/js/*",
        "fluxcanvas/workflows/*",
    )
    assert [name for name in sorted(names) if not any(fnmatch(name, pattern) for pattern in allowed)] == []
    assert not [name for name in names if "/tests/" in name or "__pycache__" in name or "/." in name]


def test_the_wheel_is_small_enough_to_download(wheel: Path) -> None:
    """The demo model may take 25 MB; nothing else is heavy."""
    assert wheel.stat().st_size < 35 * 1024**2


def test_licence_and_command_are_told(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        told = {name.rsplit("/", 1)[-1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(told["METADATA"]).decode()
        assert "License-Expression: Apache-2.0" in metadata
        assert "Apache License" in archive.read(told["LICENSE"]).decode()
        assert "fluxcanvas = fluxcanvas.web.host.cli:main" in archive.read(told["entry_points.txt"]).decode()


def test_the_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Unpacked as pip would, in front of whatever is installed here: it is this copy that runs."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys, fluxcanvas\n"
        "assert fluxcanvas.__file__.startswith(sys.argv[1]), fluxcanvas.__file__\n"
        "from fluxcanvas.web.host.cli import main\n"
        "assert 'FluxCanvas_LoadFlux' in fluxcanvas.NODE_CLASS_MAPPINGS\n"
        "sys.exit(main(['info', 'demo']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "dev" in result.stdout


def requirement_names(text: str) -> set[str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines if line}


def test_the_requirements_leave_comfyuis_own_packages_alone(checkout: Path, pyproject: dict) -> None:
    """ComfyUI-Manager installs them: naming torch or the frontend could replace what ComfyUI runs on."""
    listed = requirement_names((checkout / "requirements.txt").read_text(encoding="utf-8"))
    needed = requirement_names("\n".join(pyproject["project"]["dependencies"]))
    assert listed == needed - {"torch"}


def test_every_direct_dependency_is_pinned_for_ci(checkout: Path, pyproject: dict) -> None:
    pinned = requirement_names((checkout / "constraints.txt").read_text(encoding="utf-8"))
    project = pyproject["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    direct = requirement_names("\n".join(line for group in groups for line in group))
    assert direct - {project["name"]} <= pinned  # the test extra takes the other extras in


def test_pins_that_leave_an_old_python_behind_say_so(checkout: Path) -> None:
    """requires-python admits 3.10, which several current releases do not."""
    lines = (checkout / "constraints.txt").read_text(encoding="utf-8").splitlines()
    faults = []
    for line in filter(None, (line.split("#")[0].strip() for line in lines)):
        name = re.match(r"[\w.-]+", line)[0]
        try:
            wants = importlib.metadata.metadata(name)["Requires-Python"] or ""
        except importlib.metadata.PackageNotFoundError:
            continue
        newer = re.search(r">=\s*3\.(\d+)", wants)
        if newer and int(newer[1]) > 10 and "python_version" not in line:
            faults.append(f"{line} wants Python {wants}")
    assert faults == []


def test_a_comfyui_pack_declares_what_the_registry_reads(pyproject: dict) -> None:
    comfy = pyproject["tool"]["comfy"]
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert "web" not in comfy, "WEB_DIRECTORY names it; both together would load the extension twice"
    assert pyproject["project"]["license"] == "Apache-2.0"
    assert "dynamic" not in pyproject["project"], "the registry reads the file without building"


def test_nothing_at_the_root_shadows_the_package(checkout: Path) -> None:
    assert not (checkout / "fluxcanvas.py").exists()
    assert (checkout / "fluxcanvas").is_file()
