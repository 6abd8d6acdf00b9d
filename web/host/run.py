"""`fluxcanvas run`: a workflow file without the canvas, on the same executor, nodes and folders."""

from __future__ import annotations

import argparse
import copy
import logging
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ...flux_runtime.errors import FluxError
from ...nodes import host as node_host
from .convert import convert
from .embedded import EmbeddedHost, Interruption
from .examples import provide_inputs
from .executor import NODE_FAILURE, ExecutionResult, Executor
from .files import write_atomic
from .folders import Folders
from .node_info import object_info
from .options import HostOptions
from .overrides import apply_settings, describe, reflect
from .packs import Packs, load_packs
from .protocols import Events
from .terminal import Terminal
from .validate import Validation, validate_prompt
from .workflow_file import WorkflowFile, read_workflow, recognise

log = logging.getLogger("fluxcanvas")
CLIENT = "terminal"  # without a client the executor would tell nobody
INTERRUPTED = 130  # the exit status of a program ended by Ctrl+C
REMEDIES = {
    "required_input_missing": "connect it on the canvas, or give it a value",
    "bad_linked_input": "connect it again on the canvas",
    "return_type_mismatch": "connect an output of the right type",
    "invalid_input_type": "change the value on the canvas or with --set",
    "value_smaller_than_min": "change the value on the canvas or with --set",
    "value_bigger_than_max": "change the value on the canvas or with --set",
    "value_not_in_list": "choose another on the canvas or with --set",
    "dependency_cycle": "take one of the links out",
}


class RunError(FluxError):
    """A workflow that is not valid or whose run failed; the message names the node and what to do."""


class NoEvents:
    """Events nobody listens to."""

    def send(self, type: str, data: dict[str, Any], client_id: str | None) -> None:
        """Nobody listens."""

    def send_preview(self, image: Any, metadata: dict[str, Any], client_id: str | None) -> None:
        """Nobody looks."""

    def send_text(self, text: str, node_id: str, prompt_id: str, client_id: str | None) -> None:
        """Nobody reads."""


@dataclass(frozen=True)
class Prepared:
    """A prompt that can run: validated, with what its pictures will carry and the problems of outputs left out."""

    prompt: dict[str, Any]
    outputs: list[str]
    extra_data: dict[str, Any]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `pictures` are real paths, in the order of the nodes."""

    status: str
    pictures: list[Path]
    outputs: dict[str, dict[str, Any]]
    prompt: dict[str, Any]
    problems: list[str]


class Runner:
    """Runs workflows one after another, keeping loaded models between them."""

    def __init__(
        self, folders: Folders, packs: Packs | None = None, device: str | None = None, events: Events | None = None
    ) -> None:
        self.folders = folders
        self.packs = packs or load_packs(folders)
        self._host = EmbeddedHost(folders, device)
        self._executor = Executor(self.packs.nodes, events or NoEvents())
        self._host.release = self._executor.free

    def check_device(self) -> None:
        """FluxError when the chosen device is not there."""
        self._host.check_device()

    def prepare(self, source: WorkflowFile, settings: Iterable[str] = ()) -> Prepared:
        """Convert, apply `--set` and validate. FluxError names the node or setting that does not fit."""
        node_host.use(self._host)
        definitions = object_info(self.packs.nodes, self.packs.display_names)
        workflow = copy.deepcopy(source.workflow)
        prompt = copy.deepcopy(source.prompt) if source.prompt else convert(workflow, definitions)
        self._refuse_malformed(prompt)
        changes = apply_settings(prompt, settings, definitions)
        if workflow is not None and not reflect(workflow, changes, definitions):
            workflow = None  # a picture's workflow that did not make it is worse than none: the prompt is in it too
        verdict = validate_prompt(prompt, self.packs.nodes)
        problems = problem_lines(verdict, prompt)
        if verdict.error or not verdict.outputs:
            raise RunError("\n  ".join(problems))
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow is not None else {}
        return Prepared(prompt, verdict.outputs, extra, problems)

    def _refuse_malformed(self, prompt: dict[str, Any]) -> None:
        """Stop at what is no graph of known nodes, before anything is looked up in it."""
        verdict = validate_prompt(prompt, self.packs.nodes, targets=())
        if verdict.error and verdict.error["type"] != "prompt_no_outputs":
            raise RunError(_sentence(verdict.error))

    def execute(self, prepared: Prepared, interruption: Interruption | None = None) -> RunResult:
        """Execute; RunError names the node that failed."""
        node_host.use(self._host)
        result = self._executor.execute(
            uuid.uuid4().hex, prepared.prompt, prepared.extra_data, prepared.outputs, CLIENT, interruption=interruption
        )
        if result.status == "error":
            raise RunError(_failure(result, prepared.prompt))
        return RunResult(
            result.status, list(self._pictures(result.outputs)), result.outputs, prepared.prompt, prepared.problems
        )

    def _pictures(self, outputs: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
        """The pictures that the output nodes made. Previews are kept: they move to the output folder."""
        for shown in outputs.values():
            for image in shown.get("images", ()):
                path = self.folders.directory(image["type"]) / image.get("subfolder", "") / image["filename"]
                yield self._kept(path) if image["type"] == "temp" else path

    def _kept(self, preview: Path) -> Path:
        path = self.folders.output / preview.name
        write_atomic(path, preview.read_bytes())
        return path


def run_workflow(
    workflow: Mapping[str, Any],
    *,
    folders: Folders,
    packs: Packs | None = None,
    device: str | None = None,
    events: Events | None = None,
    settings: Iterable[str] = (),
    interruption: Interruption | None = None,
) -> RunResult:
    """Run a workflow in UI or API format on the nodes of `packs`; FluxError says what is wrong with it."""
    runner = Runner(folders, packs, device, events)
    return runner.execute(runner.prepare(recognise(workflow), settings), interruption)


def problem_lines(verdict: Validation, prompt: Mapping[str, Any]) -> list[str]:
    """What a validation found, in sentences: the node, the input, what is wrong, what to do."""
    lines = [_sentence(verdict.error)] if verdict.error and not verdict.node_errors else []
    for node_id, found in verdict.node_errors.items():
        lines += [f"{describe(node_id, prompt[node_id])}: {_sentence(error)}" for error in found["errors"]]
    return lines


def _sentence(error: Mapping[str, Any]) -> str:
    said = [str(error[key]).strip().rstrip(".") for key in ("message", "details") if error.get(key)]
    remedy = REMEDIES.get(error.get("type", ""))
    return ": ".join(said) + (f"; {remedy}." if remedy else ".")


def _failure(result: ExecutionResult, prompt: Mapping[str, Any]) -> str:
    error = next(data for event, data in reversed(result.messages) if event == "execution_error")
    node = prompt.get(error["node_id"])
    where = describe(error["node_id"], node) if node else f"node {error['node_id']}"
    return f"{where}: {str(error['exception_message']).strip()}"


def main(args: argparse.Namespace) -> int:
    """Run the file named on the command line; paths of pictures go to standard output, all else to standard error."""
    options = HostOptions(
        models=tuple(args.models),
        output=args.output,
        base_directory=args.base_directory,
        device=args.device,
        extra_model_paths_config=tuple(args.extra_model_paths_config),
    )
    source = read_workflow(args.workflow)
    folders = Folders.from_options(options)
    folders.create()
    provide_inputs(folders.input)
    terminal = Terminal(sys.stderr)
    try:
        with _logging_to(terminal, args.debug):
            runner = Runner(folders, device=args.device, events=terminal)
            runner.check_device()
            prepared = runner.prepare(source, args.set)
            terminal.begin(prepared.prompt)
            for problem in prepared.problems:
                terminal.line(f"left out: {problem}")
            result = _interruptible(lambda stop: runner.execute(prepared, stop), terminal)
    finally:
        terminal.close()
        folders.close()
    for path in result.pictures:
        print(path)
    return _exit_status(result, terminal)


def _exit_status(result: RunResult, terminal: Terminal) -> int:
    if result.status == "interrupted":
        terminal.line("interrupted")
        return INTERRUPTED
    return 1 if result.problems else 0


def _interruptible(run: Callable[[Interruption], RunResult], terminal: Terminal) -> RunResult:
    """Run in a thread, so that Ctrl+C can stop it at its next step; a second Ctrl+C ends the program at once."""
    stop = Interruption()
    done: list[RunResult | BaseException] = []

    def work() -> None:
        try:
            done.append(run(stop))
        except BaseException as error:  # handed to the main thread, which raises it
            done.append(error)

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal.line("stopping at the next step; Ctrl+C again stops at once")
        stop.set()

    before = signal.signal(signal.SIGINT, on_signal)
    thread = threading.Thread(target=work, name="fluxcanvas-run", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)  # a join without a limit would keep signals waiting
    finally:
        signal.signal(signal.SIGINT, before)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


class _TerminalLog(logging.Handler):
    """The log on the terminal, beside the bar. Tracebacks are left to --debug; a failed node is told at the end."""

    def __init__(self, terminal: Terminal, debug: bool) -> None:
        super().__init__(logging.DEBUG if debug else logging.WARNING)
        self._terminal, self._debug = terminal, debug

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._debug:
                self._terminal.line(self.format(record))
            elif not hasattr(record, NODE_FAILURE):
                self._terminal.line(record.getMessage())
        except Exception:  # whoever logs a malformed line must not fail by it; logging has a place for that
            self.handleError(record)


@contextmanager
def _logging_to(terminal: Terminal, debug: bool) -> Iterator[None]:
    handler, passed_on = _TerminalLog(terminal, debug), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = passed_on
