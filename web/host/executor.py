"""Executes prompts one after another, keeping results and node instances between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .cache import make_cache
from .embedded import Interruption, empty_device_caches
from .failure import Failure, explain
from .graph import Graph
from .prompt_run import NodeFailure, PromptRun
from .protocols import Events, Nodes, Prompt
from .reporter import Reporter
from .spec import NodeSpec, Specs

log = logging.getLogger("fluxcanvas")
Status = Literal["success", "error", "interrupted"]
NODE_FAILURE = "node_failure"  # marks a log record that repeats what the result of the prompt tells


@dataclass(frozen=True)
class ExecutionResult:
    """How a prompt ended, what its nodes showed, and the events that history keeps."""

    status: Status
    outputs: dict[str, dict[str, Any]]
    messages: list[tuple[str, dict[str, Any]]]
    meta: dict[str, dict[str, Any]]


class Instances:
    """The objects of node classes, one for each node, so that what a node keeps in itself survives from run to run.

    May be cleared from another thread while a prompt runs.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, type], tuple[str, Any]] = {}

    def begin(self, prompt: Prompt) -> None:
        """Let go of the nodes that a prompt does not have."""
        self._kept = {key: kept for key, kept in self._kept.items() if kept[0] in prompt}

    def get(self, node_id: str, owner: str, node_class: type) -> Any:
        """The object of a node; `owner` is the prompt's own node that it descends from."""
        key = node_id, node_class
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = owner, node_class()
        return kept[1]

    def clear(self) -> None:
        self._kept = {}


class Executor:
    """Runs prompts on a set of node classes. One prompt at a time."""

    def __init__(self, nodes: Nodes, events: Events, cache: str = "classic", cache_size: int = 0) -> None:
        """`cache`: "classic" keeps the last prompt's results, "lru" the last `cache_size`, "none" nothing."""
        self._nodes = nodes
        self._events = events
        self._cache = make_cache(cache, cache_size)
        self._instances = Instances()

    def free(self) -> None:
        """Let go of all results and node instances, from any thread; a running prompt keeps what it has."""
        self._cache.clear()
        self._instances.clear()

    def execute(
        self,
        prompt_id: str,
        prompt: Prompt,
        extra_data: Mapping[str, Any],
        outputs: Sequence[str],
        client_id: str | None = None,
        *,
        interruption: Interruption | None = None,
    ) -> ExecutionResult:
        """Execute the nodes `outputs` of a validated prompt and what they need. Errors of nodes end up in the result.

        Events go to `client_id`; without one only broadcasts are sent.
        """
        graph = Graph(prompt)
        reporter = Reporter(self._events, prompt_id, client_id, graph)
        reporter.prompt_started()
        self._instances.begin(prompt)
        failure = self._run(graph, reporter, extra_data, outputs, interruption or Interruption())
        status = self._conclude(reporter, failure)
        return ExecutionResult(status, reporter.outputs, reporter.messages, reporter.meta)

    def _run(
        self,
        graph: Graph,
        reporter: Reporter,
        extra_data: Mapping[str, Any],
        outputs: Sequence[str],
        interruption: Interruption,
    ) -> Failure | None:
        """Run to the end, or say what came between."""
        import torch

        def instance(node_id: str, spec: NodeSpec) -> Any:
            return self._instances.get(node_id, graph.get_real_node_id(node_id), spec.node_class)

        run = PromptRun(graph, Specs(self._nodes), self._cache, instance, reporter, extra_data, interruption)
        try:
            with torch.inference_mode():
                asyncio.run(run.run(outputs))
        except NodeFailure as failure:
            return self._explain(graph, reporter, failure.node_id, failure.__cause__ or failure, failure.inputs)
        except Exception as error:  # between two nodes: interruption, a graph wired in a circle, a fault of our own
            return self._explain(graph, reporter, run.current or outputs[0], error, {})
        return None

    def _explain(
        self, graph: Graph, reporter: Reporter, node_id: str, error: BaseException, inputs: Mapping[str, Sequence[Any]]
    ) -> Failure:
        """Put a failure on the node of the prompt that the user sees."""
        shown = graph.get_real_node_id(node_id)
        node_type = graph.get_node(shown)["class_type"]
        failure = explain(shown, node_type, error, inputs, reporter.executed)
        if not failure.interrupted:
            reporter.node_failed(node_id)
            where = "".join(failure.report["traceback"])  # as text: a log record must not keep the node's values alive
            log.error(
                "node %s (%s) failed: %s\n%s",
                shown,
                node_type,
                failure.message,
                where.rstrip(),
                extra={NODE_FAILURE: True},
            )
        return failure

    def _conclude(self, reporter: Reporter, failure: Failure | None) -> Status:
        """Tell how the prompt ended; after running out of memory, make room."""
        if failure is None:
            reporter.succeeded()
            return "success"
        if failure.interrupted:
            reporter.interrupted(failure.node_id)
            return "interrupted"
        if failure.out_of_memory:
            self.free()
            empty_device_caches()
        reporter.failed(failure.node_id, failure.report)
        return "error"
