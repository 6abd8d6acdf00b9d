"""Execution: order, events, hidden inputs, and which nodes run at all."""

from __future__ import annotations

import torch

from fluxcanvas.nodes import host
from fluxcanvas.web.host.embedded import Interrupted, executing


def test_the_events_of_a_prompt(bench, chain):
    result = bench.run(chain)
    assert bench.events.story() == [
        "execution_start",
        "execution_cached",
        "progress_state",
        "executing 1",
        "progress_state",
        "progress_state",
        "executing 2",
        "progress_state",
        "progress_state",
        "executing 3",
        "executed 3",
        "progress_state",
        "execution_success",
    ]
    assert {client for _, _, client in bench.events.events} == {"client"}
    assert all(data["prompt_id"] == "prompt" for _, data, _ in bench.events.events)
    assert bench.events.of("executing")[0] == {"prompt_id": "prompt", "node": "1", "display_node": "1"}
    assert bench.events.of("executed") == [
        {"prompt_id": "prompt", "node": "3", "display_node": "3", "output": {"values": [5]}}
    ]
    assert result.status == "success"
    assert result.outputs == {"3": {"values": [5]}}
    assert result.meta == {"3": {"node_id": "3", "display_node": "3", "parent_node": None, "real_node_id": "3"}}
    assert [name for name, _ in result.messages] == ["execution_start", "execution_cached", "execution_success"]
    assert all(isinstance(data["timestamp"], int) for _, data in result.messages)


def test_progress_states_are_cumulative(bench, chain):
    bench.run(chain)
    states = [
        {node: state["state"] for node, state in data["nodes"].items()} for data in bench.events.of("progress_state")
    ]
    assert states == [
        {"1": "running"},
        {"1": "finished"},
        {"1": "finished", "2": "running"},
        {"1": "finished", "2": "finished"},
        {"1": "finished", "2": "finished", "3": "running"},
        {"1": "finished", "2": "finished", "3": "finished"},
    ]
    assert bench.events.of("progress_state")[0]["nodes"]["1"] == {
        "value": 0.0,
        "max": 1.0,
        "state": "running",
        "prompt_id": "prompt",
        "node_id": "1",
        "display_node_id": "1",
        "parent_node_id": None,
        "real_node_id": "1",
    }


def test_progress_preview_and_text_of_a_node(bench, toys, prompt, embedded):
    def work():
        host.current().progress(1, 2, preview="picture")
        host.current().text("half way")
        return (1,)

    toys.add("Work", work)
    prompt.add("Show", "show", value=[prompt.add("Work"), 0])
    bench.run(prompt)
    assert bench.events.story()[2:9] == [
        "progress_state",
        "executing 1",
        "progress_state",
        "progress 1",
        "preview",
        "text 1",
        "progress_state",
    ]
    assert bench.events.of("progress") == [{"prompt_id": "prompt", "value": 1, "max": 2, "node": "1"}]
    assert bench.events.of("preview") == [
        {
            "image": "picture",
            "node_id": "1",
            "display_node_id": "1",
            "parent_node_id": None,
            "real_node_id": "1",
            "prompt_id": "prompt",
        }
    ]
    assert bench.events.of("text") == [{"text": "half way", "node": "1", "prompt_id": "prompt"}]
    states = [data["nodes"]["1"] for data in bench.events.of("progress_state")[:3]]
    assert [(state["value"], state["max"], state["state"]) for state in states] == [
        (0.0, 1.0, "running"),
        (1, 2, "running"),
        (2, 2, "finished"),
    ]


def test_without_a_client_nothing_but_broadcasts_is_sent(bench, chain, toys, embedded):
    def stop():
        host.current().progress(1, 2, preview="picture")
        raise Interrupted("stop")

    toys.add_output("Stop", stop, {})
    chain.add("Stop")
    bench.run(chain, client=None)
    assert [(name, client) for name, _, client in bench.events.events] == [("execution_interrupted", None)]


def test_a_message_to_the_host_from_outside_of_a_node_is_lost(embedded):
    embedded.progress(1, 2)
    embedded.text("nobody listens")
    embedded.check_interrupt()
    assert executing() is None


def test_one_output_is_finished_before_the_next_begins(bench, toys, prompt):
    toys.add("Load", lambda value: (value,), toys.NUMBER)
    for branch in ("a", "b"):
        prompt.add("Load", f"load {branch}", value=ord(branch))
        prompt.add("Add", f"add {branch}", a=[f"load {branch}", 0], b=1)
        prompt.add("Show", f"show {branch}", value=[f"add {branch}", 0])
    bench.run(prompt)
    assert [data["node"] for data in bench.events.of("executing")] == [
        "load a",
        "add a",
        "show a",
        "load b",
        "add b",
        "show b",
    ]


def test_only_what_outputs_need_is_executed(bench, chain, toys):
    chain.add("Add", a=["1", 0], b=100)
    bench.run(chain)
    assert toys.calls == ["Number", "Add", "Show"]


def test_ten_thousand_nodes_in_a_row(bench, prompt, toys):
    prompt.add("Number", "0", value=1)
    for index in range(1, 10_000):
        prompt.add("Add", str(index), a=[str(index - 1), 0], b=1)
    prompt.add("Show", "out", value=["9999", 0])
    assert bench.shown(prompt, "out") == [10_000]
    assert max(len(data["nodes"]) for data in bench.events.of("progress_state")) <= 256
    assert bench.shown(prompt, "out") == [10_000] and toys.calls == []


def test_nodes_run_in_inference_mode(bench, toys, prompt):
    toys.add("Mode", lambda: (torch.is_inference_mode_enabled(),))
    prompt.add("Show", "show", value=[prompt.add("Mode"), 0])
    assert bench.shown(prompt, "show") == [True]


def test_a_node_that_returns_no_tuple_is_told_how(bench, toys, prompt):
    toys.add_output("Wrong", lambda: 5, {})
    prompt.add("Wrong")
    assert "returned int; a node function returns a tuple" in bench.error_of(bench.run(prompt))["exception_message"]


def test_a_link_to_an_output_that_the_node_did_not_give(bench, toys, prompt):
    toys.add("Short", lambda: (1,), returns=("INT", "INT"))
    prompt.add("Show", "show", value=[prompt.add("Short"), 1])
    error = bench.error_of(bench.run(prompt))
    assert error["node_id"] == "show" and "output 1 of node 1, which gave only 1" in error["exception_message"]


def test_undeclared_links_reach_the_node_and_undeclared_literals_do_not(bench, toys, prompt):
    toys.add_output("Sum", lambda a, **more: {"ui": {"values": [a, sorted(more.items())]}}, {"a": ("INT", {})})
    prompt.add("Number", value=2)
    prompt.add("Sum", "sum", a=1, b=["1", 0], c=3)
    assert bench.shown(prompt, "sum") == [1, [("b", 2)]]


def test_ui_that_is_no_list_becomes_one(bench, toys, prompt):
    toys.add_output("Say", lambda: {"ui": {"text": "word", "pair": (1, 2)}}, {})
    prompt.add("Say")
    assert bench.run(prompt).outputs == {"1": {"text": ["word"], "pair": [1, 2]}}


def test_hidden_inputs(bench, toys, prompt):
    hidden = {
        "me": "UNIQUE_ID",
        "all": "PROMPT",
        "info": "EXTRA_PNGINFO",
        "graph": "DYNPROMPT",
        "token": "AUTH_TOKEN_COMFY_ORG",
    }

    def look(me, all, info, graph, token):
        return {"ui": {"values": [me, sorted(all), info, graph.get_node(me)["class_type"], token]}}

    toys.add_output("Look", look, {}, hidden=hidden)
    prompt.add("Look", "a")
    prompt.add("Number", "b", value=1)
    extra_data = {"extra_pnginfo": {"workflow": {"version": 1}}, "auth_token_comfy_org": "secret"}
    seen = ["a", ["a", "b"], {"workflow": {"version": 1}}, "Look", "secret"]
    assert bench.shown(prompt, "a", extra_data=extra_data) == seen
    assert bench.shown(prompt, "a", extra_data={}) == seen, "what is hidden does not count for the cache"


def test_targets_and_what_they_need(bench, prompt, toys):
    toys.add("Through", lambda value: {"ui": {"values": [value]}, "result": (value,)}, toys.NUMBER, OUTPUT_NODE=True)
    prompt.add("Number", value=1)
    prompt.add("Through", "through", value=["1", 0])
    prompt.add("Show", "wanted", value=["through", 0])
    prompt.add("Show", "unwanted", value=[prompt.add("Number", "other", value=2), 0])
    result = bench.run(prompt, targets=["wanted"])
    assert set(result.outputs) == {"through", "wanted"}
    assert toys.calls == ["Number", "Through", "Show"]
