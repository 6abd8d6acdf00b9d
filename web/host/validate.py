"""Checks a prompt before it is queued, and says what is wrong in the terms that the canvas understands.

The types of the errors, and the shape they come in, are ComfyUI's: the canvas marks nodes and inputs by them.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .checks import InputChecker, Problem, problem
from .graph import links, walk
from .protocols import Nodes, Prompt
from .spec import Specs

NODES_SHOWN = 24  # of a circle of any length
MOST_STEPS = 200_000  # taken to find which outputs depend on which errors


@dataclass(frozen=True)
class Validation:
    """The verdict. `outputs` are the output nodes that can run; `error` is set when there is none."""

    error: dict[str, Any] | None = None
    node_errors: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)


def validate_prompt(prompt: Any, nodes: Nodes, targets: Collection[str] | None = None) -> Validation:
    """Check a prompt in API format; `targets` keeps only those of its output nodes. Never raises because of the prompt.

    Runs code of node classes, and so may take a while: keep it off an event loop.
    """
    error = _malformed(prompt, nodes)
    if error:
        return Validation(error)
    outputs = [
        node_id
        for node_id, node in prompt.items()
        if _is_output(nodes[node["class_type"]]) and (targets is None or node_id in targets)
    ]
    if not outputs:
        return Validation(
            problem(
                "prompt_no_outputs",
                "The prompt has no outputs: there is nothing to run",
                "Add a node that shows or saves something, such as Preview Image.",
            )
        )
    return _complete(_Validator(prompt, nodes).verdict(outputs))


def _is_output(node_class: type) -> bool:
    return getattr(node_class, "OUTPUT_NODE", False) is True


def _malformed(prompt: Any, nodes: Nodes) -> dict[str, Any] | None:
    """The first reason why a prompt is no graph of known nodes at all."""
    if prompt is None:
        return problem("no_prompt", "No prompt was sent", "The request needs a 'prompt' in API format.")
    if not isinstance(prompt, dict):
        return problem(
            "invalid_prompt",
            "The prompt is not an object of nodes",
            f"It is a {type(prompt).__name__}; save the workflow in API format.",
        )
    for node_id, node in prompt.items():
        fault = _malformed_node(node, nodes)
        if fault:
            title = _title(node)
            return problem(
                "invalid_prompt",
                fault,
                f"Node ID '#{node_id}'",
                node_id=node_id,
                class_type=node.get("class_type") if isinstance(node, dict) else None,
                node_title=title,
            )
    return None


def _title(node: Any) -> str | None:
    meta = node.get("_meta") if isinstance(node, dict) else None
    return meta.get("title") if isinstance(meta, dict) else None


def _malformed_node(node: Any, nodes: Nodes) -> str | None:
    if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
        return "A node has no class_type: save the workflow in API format"
    if node["class_type"] not in nodes:
        return f"There is no node type {node['class_type']}: install the node pack that has it, or remove the node"
    if not isinstance(node.get("inputs"), dict):
        return f"A node of type {node['class_type']} has no inputs: save the workflow in API format"
    return None


class _Validator:
    """Validates what a prompt's outputs depend on: each node once, sources first, without recursion."""

    def __init__(self, prompt: Prompt, nodes: Nodes) -> None:
        self._prompt = prompt
        self._specs = Specs(nodes)
        self._checker = InputChecker(prompt, self._specs)
        self._problems: dict[str, list[Problem]] = {}
        self._raised: dict[str, Exception] = {}  # what the checks of these nodes themselves came to grief with

    async def verdict(self, outputs: list[str]) -> Validation:
        """The verdict on a prompt of known nodes, for these of its output nodes."""
        order, cycles = walk(outputs, self._sources)
        for cycle in cycles:
            self._note_cycle(cycle)
        for node_id in order:
            self._note(node_id, await self._check(node_id))
        bad = self._bad(order)
        good = [output for output in outputs if output not in bad]
        error = (
            None
            if good
            else problem(
                "prompt_outputs_failed_validation",
                "The prompt cannot run as it is",
                "Every output depends on a node with an error.",
            )
        )
        return Validation(error, self._node_errors([output for output in outputs if output in bad]), good)

    def _sources(self, node_id: str) -> list[str]:
        return [source for _, source, _ in links(self._prompt[node_id]) if source in self._prompt]

    def _note(self, node_id: str, problems: list[Problem]) -> None:
        if problems:
            self._problems.setdefault(node_id, []).extend(problems)

    def _note_cycle(self, cycle: list[str]) -> None:
        """Every node of a circle is told of it."""
        shown = [f"{node_id} ({self._prompt[node_id]['class_type']})" for node_id in cycle[:NODES_SHOWN]]
        path = " -> ".join([*shown, "..." if len(cycle) > NODES_SHOWN else shown[0]])
        for node_id in cycle:
            self._note(
                node_id,
                [
                    problem(
                        "dependency_cycle",
                        "The node depends on itself: remove one of these links",
                        path,
                        node_id=node_id,
                        cycle_nodes=cycle[:NODES_SHOWN],
                    )
                ],
            )

    async def _check(self, node_id: str) -> list[Problem]:
        try:
            problems = await self._checker.check(node_id)
        except Exception as error:  # INPUT_TYPES and VALIDATE_INPUTS are code of the pack's author: anything may come
            self._raised[node_id] = error
            problems = [
                problem(
                    "exception_during_validation",
                    "The node's own check of its inputs failed",
                    f"{type(error).__name__}: {error}",
                    **_raised(error),
                )
            ]
        return problems + self._check_sources(node_id)

    def _check_sources(self, node_id: str) -> list[Problem]:
        """An input whose node could not be checked is in doubt, too."""
        return [
            problem(
                "exception_during_inner_validation",
                "The linked node could not be checked",
                f"{type(error).__name__}: {error}",
                input_name=name,
                linked_node=[source, slot],
                exception_message=str(error),
                **_raised(error),
            )
            for name, source, slot in links(self._prompt[node_id])
            if (error := self._raised.get(source))
        ]

    def _bad(self, order: list[str]) -> set[str]:
        """The nodes that have problems or depend on one that has."""
        bad = set(self._problems)
        for node_id in order:
            if not bad.isdisjoint(self._sources(node_id)):
                bad.add(node_id)
        return bad

    def _node_errors(self, failed: list[str]) -> dict[str, dict[str, Any]]:
        dependents = self._dependents(failed)
        return {
            node_id: {
                "errors": problems,
                "dependent_outputs": dependents[node_id],
                "class_type": self._prompt[node_id]["class_type"],
            }
            for node_id, problems in self._problems.items()
        }

    def _dependents(self, failed: list[str]) -> dict[str, list[str]]:
        """For each node with problems the outputs that fail because of it; of an absurdly large prompt not all."""
        dependents: dict[str, list[str]] = {node_id: [] for node_id in self._problems}
        steps = 0
        for output in failed:
            reached, _ = walk([output], self._sources)
            for node_id in reached:
                if node_id in dependents:
                    dependents[node_id].append(output)
            steps += len(reached)
            if steps > MOST_STEPS:
                break
        return dependents


def _raised(error: Exception) -> dict[str, Any]:
    return {"exception_type": type(error).__name__, "traceback": traceback.format_tb(error.__traceback__)}


def _complete(coroutine: Coroutine[Any, Any, Validation]) -> Validation:
    """Run a coroutine to its end, in a thread of its own when this one runs an event loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
