"""What is told when a node fails, and memory after it."""

from __future__ import annotations

import weakref

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.web.host.embedded import EmbeddedHost


def test_the_error_of_a_node(bench, chain, toys, caplog):
    toys.add("Add", lambda a, b: [][a], {"a": ("INT", {}), "b": ("FLOAT", {})})
    result = bench.run(chain)
    error = bench.error_of(result)
    assert set(error) == {
        "prompt_id",
        "node_id",
        "node_type",
        "executed",
        "exception_message",
        "exception_type",
        "traceback",
        "current_inputs",
        "current_outputs",
        "timestamp",
    }
    assert (error["node_id"], error["node_type"], error["executed"]) == ("2", "Add", ["1"])
    assert error["exception_message"] == "list index out of range" and error["exception_type"] == "IndexError"
    assert error["current_inputs"] == {"a": [2], "b": [3.0]} and error["current_outputs"] == ["1"]
    assert any("[][a]" in line for line in error["traceback"])
    assert bench.events.story()[-2:] == ["progress_state", "execution_error"]
    states = {node: state["state"] for node, state in bench.events.of("progress_state")[-1]["nodes"].items()}
    assert states == {"1": "finished", "2": "error"}
    assert bench.events.events[-1][2] == "client"
    assert "node 2 (Add) failed: list index out of range" in caplog.text


def test_after_an_error_what_was_finished_is_kept(bench, chain, toys):
    broken = [True]
    toys.add("Add", lambda a, b: (1 / 0 if broken[0] else a + b,), {"a": ("INT", {}), "b": ("INT", {})})
    bench.run(chain)
    broken.clear()
    broken.append(False)
    assert bench.shown(chain, "3") == [5] and toys.calls == ["Add", "Show"]


def fail_with(error):
    def fail(value=None):
        raise error

    return fail


@pytest.mark.parametrize(
    "error, message, kind",
    [
        (KeyError("size"), "KeyError: 'size'", "KeyError"),
        (AssertionError(), "AssertionError: no further explanation", "AssertionError"),
        (FluxError("the file is missing"), "the file is missing", "fluxcanvas.flux_runtime.errors.FluxError"),
        (SystemExit("not a way out"), "not a way out", "SystemExit"),
    ],
)
def test_messages_and_types(bench, prompt, toys, error, message, kind):
    toys.add_output("Fail", fail_with(error), {})
    prompt.add("Fail")
    data = bench.error_of(bench.run(prompt))
    assert (data["exception_message"], data["exception_type"]) == (message, kind)


def test_inputs_in_an_error_are_short_and_go_through_json(bench, prompt, toys):
    toys.add("Tensor", lambda: (torch.zeros(1, 2, 3),), returns=("IMAGE",))
    toys.add_output("Fail", lambda **inputs: 1 / 0, {name: ("*", {}) for name in ("image", "text", "flag", "none")})
    prompt.add("Fail", image=[prompt.add("Tensor", "t"), 0], text="x" * 5000, flag=True, none={"__value__": None})
    inputs = bench.error_of(bench.run(prompt))["current_inputs"]
    assert inputs["image"] == ["Tensor[1, 2, 3]"]
    assert inputs["text"][0].endswith("(5000 characters)") and len(inputs["text"][0]) < 1100
    assert (inputs["flag"], inputs["none"]) == ([True], [None])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)
def test_out_of_memory_frees_and_says_so(bench, chain, toys, error):
    toys.add("Add", fail_with(error), {"value": ("INT", {})}, optional={"a": ("INT", {}), "b": ("INT", {})})
    toys["Add"].run = lambda self, **inputs: fail_with(error)()
    chain["2"]["inputs"]["value"] = 1
    message = bench.error_of(bench.run(chain))["exception_message"]
    assert "node 2, Add, ran out of memory" in message and "smaller size" in message
    assert str(error) in message
    bench.run(chain)
    assert toys.calls == ["Number"], "the result of the first node was let go of"


def test_memory_is_free_after_the_failed_node(bench, prompt, toys):
    kept = []

    class Big:
        pass

    def fail():
        big = Big()
        kept.append(weakref.ref(big))
        raise MemoryError("no more")

    toys.add_output("Fail", fail, {})
    prompt.add("Fail")
    bench.run(prompt)
    assert kept[0]() is None


def test_free_memory_lets_go_of_cached_results(bench, chain, toys, embedded, monkeypatch):
    monkeypatch.setattr("fluxcanvas.web.host.embedded.free_bytes", lambda device: 1000)
    embedded.release = bench.executor.free
    bench.run(chain)
    embedded.free_memory(1000)
    bench.run(chain)
    assert toys.calls == [], "there was enough"
    embedded.free_memory(1001)
    bench.run(chain)
    assert toys.calls == ["Number", "Add", "Show"]


def test_devices(embedded):
    assert embedded.device() == torch.device("cpu")
    assert EmbeddedHost(None, "cuda:1").device() == torch.device("cuda", 1)
    with pytest.raises(FluxError, match="no device 'gpu'"):
        EmbeddedHost(None, "gpu").device()
