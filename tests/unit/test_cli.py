"""The command line: what it accepts, what it hands on, and how it tells errors."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.web.host import cli


@pytest.mark.parametrize("argv", [[], ["--port", "9000"], ["--no-open"], ["serve"]])
def test_without_a_command_it_serves(argv: list[str]) -> None:
    assert cli.parse(argv).command == "serve"


def test_serve_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fake = types.ModuleType("app")
    fake.serve = lambda options: seen.append(options) or 0
    monkeypatch.setitem(sys.modules, "fluxcanvas.web.host.app", fake)
    monkeypatch.setattr("fluxcanvas.web.host.app", fake, raising=False)
    line = "--port 0 --models a --models b --output o --base-directory d --no-open --device cpu"
    assert (
        cli.main([*line.split(), "--extra-model-paths-config", "x.yaml", "--cache-lru", "5", "--allow-host", "box"])
        == 0
    )
    (options,) = seen
    assert (options.host, options.port, options.open_browser, options.device) == ("127.0.0.1", 0, False, "cpu")
    assert options.models == (Path("a"), Path("b"))
    assert (options.output, options.base_directory) == (Path("o"), Path("d"))
    assert options.extra_model_paths_config == (Path("x.yaml"),)
    assert (options.cache_lru, options.cache_none, options.allowed_hosts) == (5, False, ("box",))


@pytest.mark.parametrize(
    "line",
    [
        "serve --port 65536",
        "serve --port -1",
        "serve --cache-lru 0",
        "serve --cache-lru 3 --cache-none",
        "run",
        "run a.json --set seed=1",
        "run a.json --set Sample.seed",
        "info",
        "nonsense",
    ],
)
def test_wrong_arguments_end_with_status_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(line.split())
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_settings_of_a_run_are_kept_as_written() -> None:
    args = cli.parse(["run", "w.json", "--set", "Encode Prompt.prompt=a = b", "--set", "3.seed=1", "-o", "out"])
    assert args.set == ["Encode Prompt.prompt=a = b", "3.seed=1"]
    assert (args.workflow, args.output) == (Path("w.json"), Path("out"))


def failing(error: BaseException):
    def command(_: object) -> int:
        raise error

    return command


def test_a_mendable_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "info", failing(FluxError("no file 'x': name one that exists")))
    assert cli.main(["info", "x"]) == 1
    assert capsys.readouterr().err == "error: no file 'x': name one that exists\n"
    with pytest.raises(FluxError):
        cli.main(["info", "x", "--debug"])
    monkeypatch.setenv("FLUXCANVAS_DEBUG", "1")
    with pytest.raises(FluxError):
        cli.main(["info", "x"])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "info", failing(KeyError("ours")))
    with pytest.raises(KeyError):
        cli.main(["info", "x"])


def test_a_missing_host_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "serve", failing(ModuleNotFoundError("no aiohttp", name="aiohttp.web")))
    assert cli.main(["serve"]) == 1
    assert "pip install 'fluxcanvas[host]'" in capsys.readouterr().err
    monkeypatch.setattr(cli, "serve", failing(ModuleNotFoundError("no such", name="fluxcanvas.nothing")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["serve"])


def test_ctrl_c_is_not_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "info", failing(KeyboardInterrupt()))
    assert cli.main(["info", "x"]) == 130
    assert capsys.readouterr().err == ""


def test_test_points_to_the_script(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["test", "-k", "something"]) == 1
    assert f"{checkout / 'fluxcanvas'} test" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fluxcanvas.web.host import cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'aiohttp', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
