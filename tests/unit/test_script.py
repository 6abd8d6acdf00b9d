"""The script `./fluxcanvas`: what it decides, and what it does with an installation that is cut off, fails or is moved.

Nothing is downloaded: where the steps are run at all, a few lines of Python stand in for pip.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

EXTRAS = {"host"}


@pytest.fixture
def script(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a fresh module, without leaving bytecode beside it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("fluxcanvas_script", str(checkout / "fluxcanvas"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def root(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout under an awkward name, with the two files that decide what is installed."""
    root = tmp_path / "Fluß und Leinwand 画布"
    root.mkdir()
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("torch==1\n")
    monkeypatch.setattr(script, "ROOT", root)
    return root


class Installer:
    """Stands in for venv and pip: makes the environment's python and a file, and can be told to fail."""

    def __init__(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self.code = "print('Installing collected packages: torch numpy')"
        monkeypatch.setattr(script, "installer_steps", self.steps)

    def steps(self, venv, extras) -> list[list[str]]:
        self.runs += 1
        make = (
            "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.touch();"
            "(p.parent / 'half-installed').touch()"
        )
        return [[sys.executable, "-c", make, str(venv.python)], [sys.executable, "-c", self.code]]


@pytest.fixture
def installer(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Installer:
    return Installer(script, monkeypatch)


def test_an_old_python_is_told_in_a_sentence(script: ModuleType) -> None:
    assert "Python 3.10 or newer is needed" in script.too_old((3, 9, 18)) and "is Python 3.9" in script.too_old((3, 9))
    assert script.too_old((3, 10, 0)) is script.too_old((3, 14, 1)) is None


def test_the_script_parses_on_the_oldest_python_3_that_systems_still_carry(checkout: Path) -> None:
    """A syntax error would come before the sentence about the version."""
    ast.parse((checkout / "fluxcanvas").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_the_script_needs_the_standard_library_alone(checkout: Path) -> None:
    tree = ast.parse((checkout / "fluxcanvas").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.skipif(os.name == "nt", reason="Windows has no executable bit")
def test_the_script_is_executable(checkout: Path) -> None:
    assert os.access(checkout / "fluxcanvas", os.X_OK)
    assert os.access(checkout / ".ci" / "run", os.X_OK)


def test_the_environment_on_windows_and_elsewhere(script: ModuleType, tmp_path: Path) -> None:
    there = script.Venv(tmp_path, windows=True)
    assert there.python == tmp_path / "Scripts" / "python.exe"
    assert there.command("pytest", ["-x"]) == [str(tmp_path / "Scripts" / "pytest.exe"), "-x"]
    here = script.Venv(tmp_path, windows=False)
    assert here.python == tmp_path / "bin" / "python"
    assert here.command("pytest", ["-x"]) == [str(tmp_path / "bin" / "python"), str(tmp_path / "bin" / "pytest"), "-x"]


def test_only_what_decides_the_installation_changes_the_stamp(script: ModuleType, root: Path) -> None:
    before = script.wanted(root, (3, 11, 7))
    assert script.wanted(root, (3, 11, 9)) == before
    assert script.wanted(root, (3, 12, 7))["place"] != before["place"]
    (root / "README.md").write_text("words")
    assert script.wanted(root, (3, 11, 7)) == before
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_text((root / name).read_text() + "# more\n")
        after = script.wanted(root, (3, 11, 7))
        assert after["needs"] != before["needs"] and after["place"] == before["place"]
        before = after


def install(script: ModuleType, root: Path, extras: set[str] = EXTRAS):
    """Run the installation as a start does; the environment."""
    venv = script.Venv(root / ".venv")
    want = script.wanted(root, sys.version_info)
    if not script.ready(venv, want, extras):
        script.install(venv, want, extras)
    return venv


def test_the_second_start_installs_nothing(script: ModuleType, root: Path, installer: Installer) -> None:
    venv = install(script, root)
    assert installer.runs == 1 and venv.python.exists() and not venv.marker.exists()
    install(script, root)
    assert installer.runs == 1
    install(script, root, {"host", "test"})
    assert installer.runs == 2
    install(script, root)
    assert installer.runs == 2, "what has more extras serves for fewer"


def test_changed_needs_update_and_keep_the_environment(script: ModuleType, root: Path, installer: Installer) -> None:
    venv = install(script, root)
    (venv.folder / "kept").touch()
    (root / "constraints.txt").write_text("torch==2\n")
    install(script, root)
    assert installer.runs == 2 and (venv.folder / "kept").exists()


def test_a_moved_checkout_gets_a_new_environment(
    script: ModuleType, root: Path, installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(script, root)
    moved = root.with_name("elsewhere")
    root.rename(moved)
    (moved / ".venv" / "stale").touch()
    monkeypatch.setattr(script, "ROOT", moved)
    venv = install(script, moved)
    assert installer.runs == 2 and not (venv.folder / "stale").exists()


def test_an_installation_that_was_cut_off_starts_anew_and_keeps_its_downloads(
    script: ModuleType, root: Path, installer: Installer
) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    venv, want = script.Venv(root / ".venv"), script.wanted(root, sys.version_info)
    run_logged, script.run_logged = script.run_logged, cut_off
    with pytest.raises(KeyboardInterrupt):
        script.install(venv, want, EXTRAS)
    assert venv.marker.exists() and not script.ready(venv, want, EXTRAS)
    (venv.folder / "half.py").touch()
    venv.cache.mkdir()
    seen: list[bool] = []

    def looking(*arguments: object) -> None:
        seen.append(venv.cache.exists() and not (venv.folder / "half.py").exists())
        run_logged(*arguments)

    script.run_logged = looking
    script.install(venv, want, EXTRAS)
    assert seen == [True, True], "the remains are gone and the downloads still there when it starts again"
    assert script.ready(venv, want, EXTRAS) and not venv.cache.exists() and not venv.scratch.exists()


def test_a_failure_gives_a_reason_and_the_log(script: ModuleType, root: Path, installer: Installer) -> None:
    installer.code = "import sys; print('ERROR: [Errno 28] No space left on device'); sys.exit(1)"
    with pytest.raises(script.Problem, match="the disk is full") as problem:
        install(script, root)
    log = root / ".venv" / "install.log"
    assert str(log) in str(problem.value) and "No space left" in log.read_text()
    installer.code = "print('better')"
    assert install(script, root).python.exists()


def test_an_update_without_a_network_loses_nothing(script: ModuleType, root: Path, installer: Installer) -> None:
    venv = install(script, root)
    (venv.folder / "kept").touch()
    (root / "constraints.txt").write_text("torch==2\n")
    installer.code = "import sys; print('WARNING: Retrying: NameResolutionError'); sys.exit(1)"
    for _ in range(2):
        with pytest.raises(script.Problem, match="cannot be reached"):
            install(script, root)
        assert (venv.folder / "kept").exists() and not script.ready(venv, script.wanted(root, sys.version_info), EXTRAS)
    installer.code = "print('back')"
    install(script, root)
    assert (venv.folder / "kept").exists() and script.ready(venv, script.wanted(root, sys.version_info), EXTRAS)


def test_a_clearing_that_was_cut_off_is_taken_up_again(
    script: ModuleType, root: Path, installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = install(script, root)
    venv.python.unlink()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            install(script, root)
    assert (venv.bin / "half-installed").exists()
    assert install(script, root).python.exists()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "WARNING: Retrying after NameResolutionError\nERROR: No matching distribution found for torch==2.13.0",
            "cannot be reached",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "no PyTorch for this Python"),
        ("The virtual environment was not created because ensurepip is not available", "apt install python3-venv"),
        ("  ERROR: a new kind of trouble\nerror: subprocess-exited-with-error\n", "ERROR: a new kind of trouble"),
        ("only this\n\n", "only this"),
        ("", "the installer said nothing"),
    ],
)
def test_reasons_are_readable(script: ModuleType, log: str, words: str) -> None:
    assert words in script.reason(log)


@pytest.mark.skipif(os.name == "nt", reason="groups of processes are POSIX's")
def test_stopping_ends_what_a_step_has_started(
    script: ModuleType, root: Path, installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A helper of the installer that went on alone would write into the next attempt."""
    late = "import time; time.sleep(2); open('survived', 'w')"
    installer.code = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {late!r}]);"
        "print('Installing collected packages:', flush=True); p.wait()"
    )

    def stop(_: object, text: str) -> None:
        if text.startswith("unpacking"):
            raise KeyboardInterrupt

    monkeypatch.setattr(script.Progress, "say", stop)
    with pytest.raises(KeyboardInterrupt):
        install(script, root)
    time.sleep(2.5)
    assert not (root / "survived").exists()


def test_somebody_elses_environment_is_left_alone(script: ModuleType, root: Path, installer: Installer) -> None:
    mine = root / ".venv" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(script.Problem, match="was not made by this script"):
        install(script, root)
    assert mine.exists() and installer.runs == 0


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(
    script: ModuleType, root: Path, installer: Installer
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    script.can_stay = refuse
    with pytest.raises(script.Problem, match=r"cannot write to .*Permission denied.*put this folder"):
        install(script, root)


def test_two_starts_install_once(
    script: ModuleType, root: Path, installer: Installer, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = script.Venv(root / ".venv")
    venv.folder.mkdir()
    with script.alone(venv.lock):
        second = threading.Thread(target=install, args=(script, root))
        second.start()
        second.join(0.5)
        assert second.is_alive() and installer.runs == 0
        script.build(venv, script.wanted(root, sys.version_info), EXTRAS)
    second.join(20)
    assert not second.is_alive() and installer.runs == 1
    assert "waiting for it" in capsys.readouterr().err


def test_the_installer_writes_into_the_folder_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "TMPDIR", "PIP_USER"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.delenv("PIP_CACHE_DIR", raising=False)
    venv = script.Venv(tmp_path)
    environment = script.installer_environment(venv)
    assert "PYTHONPATH" not in environment and environment["PIP_USER"] == "0"
    assert {environment["TMPDIR"], environment["TEMP"], environment["TMP"]} == {str(venv.scratch)}
    assert environment["PIP_CACHE_DIR"] == str(venv.cache)


def test_the_steps_use_the_constraints_and_the_extras(script: ModuleType, tmp_path: Path) -> None:
    make, install_step = script.installer_steps(script.Venv(tmp_path), {"test", "host"})
    assert make[1:3] == ["-m", "venv"]
    assert install_step[-4:] == ["-c", "constraints.txt", "-e", ".[host,test]"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "  Downloading torch-2.13.0-cp311-none-any.whl (750.2 MB)\n",
            "downloading torch-2.13.0-cp311-none-any.whl (750.2 MB)",
        ),
        ("  Downloading https://x.org/a.whl (12.5 MB)\n", "downloading a.whl (12.5 MB)"),
        ("  Downloading small-1.0-py3-none-any.whl (9.9 MB)\n", None),
        ("  Downloading tiny-1.0-py3-none-any.whl (120 kB)\n", None),
        ("Installing collected packages: a, b, c\n", "unpacking 3 packages"),
        ("Collecting numpy\n", None),
        ("\n", None),
    ],
)
def test_progress_says_what_takes_long(script: ModuleType, line: str, said: str | None) -> None:
    assert script.stage(line) == said


def test_without_a_terminal_progress_is_plain_lines(script: ModuleType) -> None:
    stream = io.StringIO()
    with script.Progress("begin", stream) as progress:
        progress.say("unpacking")
        progress.say("unpacking")
    assert stream.getvalue().splitlines() == ["fluxcanvas: begin", "fluxcanvas: unpacking"]


def test_pytest_gets_the_users_arguments_or_all_cores(script: ModuleType) -> None:
    assert script.pytest_arguments(["-k", "name"], 8) == ["-k", "name"]
    assert script.pytest_arguments([], 2)[:3] == ["-q", "-n", "2"]
    assert script.pytest_arguments([], 64)[2] == "4"


def test_tests_on_a_python_without_the_oracle(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(script.Problem, match=r"Python 3\.11 or newer"):
        script.start(["test"])


@pytest.fixture
def bare(checkout: Path, tmp_path: Path) -> Path:
    """The few files that answer --help, in a folder with a space and no environment."""
    bare = tmp_path / "a folder"
    for name in (
        "fluxcanvas",
        "pyproject.toml",
        "constraints.txt",
        "__init__.py",
        "web/__init__.py",
        "web/host/__init__.py",
    ):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, bare / name)
    shutil.copy(checkout / "web/host/cli.py", bare / "web/host/cli.py")
    return bare


def started(bare: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with Python alone (-S: no site-packages), from another folder."""
    command = [sys.executable, "-S", str(bare / "fluxcanvas"), *arguments]
    return subprocess.run(command, cwd=bare.parent, capture_output=True, text=True, timeout=60, check=False)


def test_help_and_wrong_arguments_are_answered_before_anything_is_installed(bare: Path) -> None:
    told = started(bare, "--help")
    assert told.returncode == 0 and "serve" in told.stdout and "run" in told.stdout
    wrong = started(bare, "sevre")
    assert wrong.returncode == 2 and "sevre" in wrong.stderr
    assert started(bare, "serve", "--port", "many").returncode == 2
    assert not (bare / ".venv").exists()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for the command is a POSIX one")
def test_a_start_becomes_the_command(script: ModuleType, bare: Path) -> None:
    """Arguments, exit status and working folder are the command's; without a command it is told nothing."""
    venv = script.Venv(bare / ".venv")
    venv.bin.mkdir(parents=True)
    venv.python.symlink_to(sys.executable)
    (venv.bin / "fluxcanvas").write_text("import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(7)")
    want = script.wanted(bare, sys.version_info)
    venv.stamp.write_text(json.dumps({**want, "extras": ["host"]}))
    told = started(bare, "run", "a file.json", "--set", "1.seed=2")
    assert told.returncode == 7, told.stderr
    assert told.stdout.strip() == f"{bare.parent} ['run', 'a file.json', '--set', '1.seed=2']"
    assert started(bare).stdout.strip().endswith("[]")
