"""Toy nodes, and a bench that runs prompts of them: what the tests of the execution core share.

`toys` makes node classes from plain functions and records each call; `bench` validates and executes prompts.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.nodes import host
from fluxcanvas.web.host.blocker import ExecutionBlocker
from fluxcanvas.web.host.embedded import EmbeddedHost, Interruption
from fluxcanvas.web.host.executor import ExecutionResult, Executor
from fluxcanvas.web.host.validate import Validation, validate_prompt


class Recorder:
    """Events that are kept in a list, as (type, data, client)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], str | None]] = []
        self._lock = threading.Lock()

    def send(self, type: str, data: dict[str, Any], client_id: str | None) -> None:
        with self._lock:
            self.events.append((type, data, client_id))

    def send_preview(self, image: Any, metadata: dict[str, Any], client_id: str | None) -> None:
        self.send("preview", {"image": image, **metadata}, client_id)

    def send_text(self, text: str, node_id: str, prompt_id: str, client_id: str | None) -> None:
        self.send("text", {"text": text, "node": node_id, "prompt_id": prompt_id}, client_id)

    def of(self, type: str) -> list[dict[str, Any]]:
        """The data of all events of a type."""
        return [data for name, data, _ in self.events if name == type]

    def story(self) -> list[str]:
        """The events as short words, such as "executing 2"."""
        return [f"{name} {data['node']}" if "node" in data else name for name, data, _ in self.events]


class Toys(dict[str, type]):
    """Node classes by id. `calls` holds the id of every node function that was called, in order."""

    NUMBER = {"value": ("INT", {})}  # the input of many toys

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        required: dict[str, Any] | None = None,
        returns: tuple[Any, ...] = ("INT",),
        optional: dict[str, Any] | None = None,
        hidden: dict[str, str] | None = None,
        **attributes: Any,
    ) -> type:
        """Make a node class of a function without self, and register it."""
        calls = self.calls
        inputs = {"required": required or {}, "optional": optional or {}, "hidden": hidden or {}}

        def run(self: Any, **arguments: Any) -> Any:
            calls.append(name)
            return function(**arguments)

        async def run_async(self: Any, **arguments: Any) -> Any:
            calls.append(name)
            return await function(**arguments)

        methods = {
            "INPUT_TYPES": classmethod(lambda cls: inputs),
            "FUNCTION": "run",
            "RETURN_TYPES": returns,
            "run": run_async if inspect.iscoroutinefunction(function) else run,
            **attributes,
        }
        self[name] = type(name, (), methods)
        return self[name]

    def add_output(self, name: str, function: Callable[..., Any], required: dict[str, Any], **rest: Any) -> type:
        """The same, of a node that drives execution."""
        return self.add(name, function, required, rest.pop("returns", ()), OUTPUT_NODE=True, **rest)


class Prompt(dict[str, Any]):
    """A prompt under construction."""

    def add(self, class_type: str, node_id: str | None = None, **inputs: Any) -> str:
        """Add a node and return its id."""
        node_id = node_id or str(len(self) + 1)
        self[node_id] = {"class_type": class_type, "inputs": inputs}
        return node_id


@dataclass
class Bench:
    """Runs prompts on the toys, as the host does."""

    toys: Toys
    events: Recorder = field(default_factory=Recorder)
    executor: Executor = field(init=False)

    def __post_init__(self) -> None:
        self.use_cache("classic")

    def use_cache(self, mode: str, size: int = 0) -> None:
        self.executor = Executor(self.toys, self.events, mode, size)

    def validate(self, prompt: Any, targets: Any = None) -> Validation:
        return validate_prompt(prompt, self.toys, targets)

    def run(
        self,
        prompt: Prompt,
        targets: list[str] | None = None,
        client: str | None = "client",
        extra_data: dict[str, Any] | None = None,
        interruption: Interruption | None = None,
    ) -> ExecutionResult:
        """Validate and execute; `toys.calls` and `events` then tell of this run alone."""
        verdict = self.validate(prompt, targets)
        assert verdict.error is None, verdict
        self.toys.calls.clear()
        self.events.events.clear()
        return self.executor.execute(
            "prompt", prompt, extra_data or {}, verdict.outputs, client, interruption=interruption
        )

    def shown(self, prompt: Prompt, node_id: str, **options: Any) -> list[Any]:
        """What the node Show displays after a run that must succeed."""
        result = self.run(prompt, **options)
        assert result.status == "success", result.messages
        return result.outputs[node_id]["values"]

    def error_of(self, result: ExecutionResult) -> dict[str, Any]:
        """The data of the error that ended a prompt; like all events it must go through JSON."""
        assert result.status == "error", result
        name, data = result.messages[-1]
        assert name == "execution_error"
        json.dumps(data, allow_nan=False)
        return data


class NoFolders:
    """Model folders without models."""

    def roots(self, category: str) -> list[Path]:
        return []

    def list(self, category: str) -> list[str]:
        return []

    def resolve(self, category: str, name: str) -> Path:
        raise FluxError(f"there is no {name}")


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> EmbeddedHost:
    """The embedded host, registered for one test alone."""
    monkeypatch.setattr(host, "_registered", [])
    embedded = EmbeddedHost(NoFolders(), "cpu")
    host.use(embedded)
    return embedded


@pytest.fixture
def toys() -> Toys:
    """Number and Text give a literal, Add adds, Numbers gives a list, Block blocks a value, Show displays its input."""
    toys = Toys()
    number = ("INT", {"default": 0, "min": -1000, "max": 1000})
    toys.add("Number", lambda value: (value,), {"value": number})
    toys.add("Text", lambda text: (text,), {"text": ("STRING", {})}, ("STRING",))
    toys.add("Add", lambda a, b: (a + b,), {"a": number, "b": number})
    toys.add("Numbers", lambda count: (list(range(count)),), {"count": number}, OUTPUT_IS_LIST=(True,))
    toys.add(
        "Block",
        lambda value, at, message="": (ExecutionBlocker(message or None) if value == at else value,),
        {"value": number, "at": number},
        optional={"message": ("STRING", {})},
    )
    toys.add_output("Show", lambda value: {"ui": {"values": [value]}}, {"value": ("*", {})})
    return toys


@pytest.fixture
def choose(toys: Toys) -> None:
    """Choose gives its input `a` or `b`, which are lazy, by its input `first`."""

    def check_lazy_status(self: Any, first: bool, a: Any = None, b: Any = None) -> list[str]:
        toys.calls.append(f"check {a} {b}")
        return ["a"] if first else ["b"]

    lazy = ("INT", {"lazy": True})
    toys.add(
        "Choose",
        lambda first, a=None, b=None: (a if first else b,),
        {"first": ("BOOLEAN", {}), "a": lazy, "b": lazy},
        check_lazy_status=check_lazy_status,
    )
    toys.add("Left", lambda: (1,))
    toys.add("Right", lambda: (2,))


@pytest.fixture
def bench(toys: Toys) -> Bench:
    return Bench(toys)


@pytest.fixture
def prompt() -> Prompt:
    return Prompt()


@pytest.fixture
def chain(toys: Toys) -> Prompt:
    """1: Number 2 -> 2: Add 3 -> 3: Show."""
    chain = Prompt()
    chain.add("Number", value=2)
    chain.add("Add", a=["1", 0], b=3)
    chain.add("Show", value=["2", 0])
    return chain
