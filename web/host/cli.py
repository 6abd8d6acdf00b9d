"""The `fluxcanvas` command: reads the arguments and hands over. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

HOST_EXTRA = ("aiohttp", "comfyui_frontend_package", "yaml")  # what `fluxcanvas[host]` adds


class _Version(argparse.Action):
    """Prints the installed version; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        try:
            print("fluxcanvas", metadata.version("fluxcanvas"))
        except metadata.PackageNotFoundError:
            print("fluxcanvas, not installed yet")
        parser.exit()


def port(text: str) -> int:
    """A TCP port; 0 asks the system for a free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 0 to 65535")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def setting(text: str) -> str:
    """NODE.INPUT=VALUE, passed on as it is: which node is meant is known only when the workflow has been read."""
    if "." not in text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODE.INPUT=VALUE, such as --set Sample.seed=7")
    return text


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="fluxcanvas", description="FLUX.1 on a node canvas.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = _common()
    _add_serve(commands.add_parser("serve", parents=[common], help="open the canvas in the browser (the default)"))
    _add_run(commands.add_parser("run", parents=[common], help="run a workflow file without the canvas"))
    _add_info(commands.add_parser("info", help="say what a checkpoint is, from its header alone"))
    test = commands.add_parser("test", help="run the test suite (in a checkout)", add_help=False)
    test.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _common() -> argparse.ArgumentParser:
    """Where the models are and what computes: the same for the canvas and for a single run."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--models",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with diffusion_models/, text_encoders/, vae/ ... as ComfyUI has them; may be given again",
    )
    common.add_argument(
        "--extra-model-paths-config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a ComfyUI extra_model_paths.yaml; may be given again",
    )
    common.add_argument(
        "--base-directory",
        type=Path,
        metavar="DIR",
        help="the folder that holds models/, input/, output/ and user/ (or FLUXCANVAS_HOME)",
    )
    common.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; the best there is unless said")
    common.add_argument("--debug", action="store_true", help="on an error show the traceback (or FLUXCANVAS_DEBUG=1)")
    return common


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (%(default)s: this machine only)")
    parser.add_argument("--port", type=port, default=8188, help="the port to listen on, 0 for a free one (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where SaveImage writes")
    parser.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=True, help="open the browser on the starter workflow"
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which browsers may reach this server; may be given again",
    )
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache-lru", type=count, default=0, metavar="N", help="keep the results of the last N nodes")
    cache.add_argument("--cache-none", action="store_true", help="keep no results: every run computes everything")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workflow", type=Path, metavar="WORKFLOW.json", help="as the canvas saves or exports it")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is a node's id or its title; may be given again",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where the pictures go")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a .safetensors file, a diffusers folder, a Hugging Face repo id, or demo")
    parser.add_argument("--debug", action="store_true", help="on an error show the traceback (or FLUXCANVAS_DEBUG=1)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; without a command it is `serve`. Help and wrong arguments end the program."""
    arguments = list(argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "serve")
    if arguments[0] == "test":  # what follows belongs to pytest, its options too
        return argparse.Namespace(command="test", arguments=arguments[1:])
    return build_parser().parse_args(arguments)


def serve(args: argparse.Namespace) -> int:
    """Serve the canvas until it is interrupted."""
    from . import app
    from .options import HostOptions

    options = HostOptions(
        host=args.host,
        port=args.port,
        models=tuple(args.models),
        output=args.output,
        base_directory=args.base_directory,
        open_browser=args.open,
        device=args.device,
        extra_model_paths_config=tuple(args.extra_model_paths_config),
        cache_lru=args.cache_lru,
        cache_none=args.cache_none,
        allowed_hosts=tuple(args.allow_host),
    )
    return app.serve(options) or 0


def run(args: argparse.Namespace) -> int:
    """Run one workflow file."""
    from . import run as headless

    return headless.main(args) or 0


def info(args: argparse.Namespace) -> int:
    """Print what a checkpoint is."""
    from ...flux_runtime import inspect

    print(inspect(args.source).text())
    return 0


def test(args: argparse.Namespace) -> int:
    """The suite is started by the script beside it, which also installs what the tests need; this says so."""
    script = Path(__file__).resolve().parents[2] / "fluxcanvas"
    how = f"run {script} test" if script.is_file() else "get a checkout and run ./fluxcanvas test in it"
    return _fail(f"the tests are not part of the installed package: {how}")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit status. What the user can mend is told in one line, without a traceback."""
    from ...flux_runtime.errors import FluxError

    args = parse(sys.argv[1:] if argv is None else argv)
    debug = getattr(args, "debug", False) or os.environ.get("FLUXCANVAS_DEBUG", "") not in ("", "0")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fluxcanvas").setLevel(logging.DEBUG if debug else logging.INFO)
    command = {"serve": serve, "run": run, "info": info, "test": test}[args.command]
    try:
        return command(args)
    except KeyboardInterrupt:
        return 130
    except FluxError as error:
        if debug:
            raise
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if debug or (error.name or "").partition(".")[0] not in HOST_EXTRA:
            raise
        return _fail(f"{error.name} is not installed, which the canvas needs: pip install 'fluxcanvas[host]'")
