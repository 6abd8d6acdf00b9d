"""What is executed again, and what is kept."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.nodes import host
from fluxcanvas.web.host.executor import Executor

NEVER_SAME = float("nan")


def test_a_second_run_executes_nothing_and_shows_the_same(bench, chain, toys):
    bench.run(chain)
    result = bench.run(chain)
    assert toys.calls == []
    assert bench.events.story() == ["execution_start", "execution_cached", "executed 3", "execution_success"]
    assert set(bench.events.of("execution_cached")[0]["nodes"]) == {"1", "2", "3"}
    assert bench.events.of("executed")[0]["output"] == {"values": [5]}
    assert result.outputs == {"3": {"values": [5]}} and result.meta["3"]["node_id"] == "3"


def test_what_a_cached_node_told_is_told_again(bench, toys, prompt, embedded):
    def report():
        host.current().text("opening")
        host.current().text("three layers")
        return {"ui": {}}

    toys.add_output("Report", report, {})
    prompt.add("Report", "1")
    bench.run(prompt)
    bench.run(prompt)
    assert toys.calls == []
    assert [told["text"] for told in bench.events.of("text")] == ["three layers"]


def test_cached_outputs_are_in_the_result_even_without_a_client(bench, chain):
    bench.run(chain)
    assert bench.run(chain, client=None).outputs == {"3": {"values": [5]}}


def test_a_changed_input_runs_what_depends_on_it_alone(bench, chain, toys):
    bench.run(chain)
    chain["2"]["inputs"]["b"] = 4
    assert bench.shown(chain, "3") == [6]
    assert toys.calls == ["Add", "Show"]
    assert bench.events.of("execution_cached")[0]["nodes"] == ["1"]


@pytest.mark.parametrize("old, new", [(1, 2), (1, 1.0), (1, "1"), (1, True), ("a", "b"), ([1], [2]), (None, 0)])
def test_unequal_literals_are_told_apart(bench, toys, prompt, old, new):
    toys.add("Any", lambda value=None: (repr(value),), optional={"value": ("*", {})})
    prompt.add("Show", "show", value=[prompt.add("Any", value={"__value__": old}), 0])
    assert bench.shown(prompt, "show") == [repr(old)]
    prompt["1"]["inputs"]["value"] = {"__value__": new}
    assert bench.shown(prompt, "show") == [repr(new)]


def test_the_slot_of_a_link_counts(bench, toys, prompt):
    toys.add("Two", lambda: (1, 2), returns=("INT", "INT"))
    prompt.add("Show", "show", value=[prompt.add("Two"), 0])
    assert bench.shown(prompt, "show") == [1]
    prompt["show"]["inputs"]["value"] = ["1", 1]
    assert bench.shown(prompt, "show") == [2] and toys.calls == ["Show"]


def test_ids_do_not_count(bench, chain, prompt, toys):
    bench.run(chain)
    prompt.add("Number", "x", value=2)
    prompt.add("Add", "y", a=["x", 0], b=3)
    prompt.add("Show", "z", value=["y", 0])
    assert bench.shown(prompt, "z") == [5] and toys.calls == []


def test_equal_nodes_of_one_prompt_run_once_and_both_show(bench, chain, toys):
    chain.add("Show", "again", value=["2", 0])
    result = bench.run(chain)
    assert toys.calls == ["Number", "Add", "Show"]
    assert result.outputs == {"3": {"values": [5]}, "again": {"values": [5]}}
    assert [data["node"] for data in bench.events.of("executed")] == ["3", "again"]


@pytest.mark.parametrize("options", [{"NOT_IDEMPOTENT": True}, {"hidden": {"me": "UNIQUE_ID"}}])
def test_ids_count_where_the_class_says_so(bench, toys, prompt, options):
    toys.add("Own", lambda value, me=None: (value,), toys.NUMBER, **options)
    prompt.add("Show", "a", value=[prompt.add("Own", "1", value=1), 0])
    prompt.add("Show", "b", value=[prompt.add("Own", "2", value=1), 0])
    bench.run(prompt)
    assert toys.calls.count("Own") == 2
    bench.run(prompt)
    assert toys.calls == []
    prompt["3"] = prompt.pop("1")
    prompt["a"]["inputs"]["value"] = ["3", 0]
    bench.run(prompt)
    assert toys.calls.count("Own") == 1


def test_is_changed(bench, toys, prompt):
    version = [1]
    toys.add(
        "File",
        lambda name: (version[0],),
        {"name": ("STRING", {})},
        IS_CHANGED=classmethod(lambda cls, name: version[0]),
    )
    prompt.add("Show", "show", value=[prompt.add("File", name="x"), 0])
    assert bench.shown(prompt, "show") == [1]
    assert bench.shown(prompt, "show") == [1] and toys.calls == []
    version[0] = 2
    assert bench.shown(prompt, "show") == [2] and toys.calls == ["File", "Show"]


@pytest.mark.parametrize(
    "value, runs",
    [
        (NEVER_SAME, True),
        (b"hash", False),
        ({"a", "b"}, False),
        (None, False),
        ((1, (2, "x")), False),
        (object(), True),
        ([0.5, NEVER_SAME], True),
    ],
)
def test_what_is_changed_may_return(bench, toys, prompt, value, runs):
    toys.add("File", lambda: (1,), IS_CHANGED=classmethod(lambda cls: value))
    prompt.add("Show", "show", value=[prompt.add("File"), 0])
    bench.run(prompt)
    bench.run(prompt)
    assert toys.calls == (["File", "Show"] if runs else [])


def test_is_changed_sees_none_for_links(bench, toys, prompt):
    seen = []
    toys.add(
        "File",
        lambda value, scale: (value * scale,),
        {"value": ("INT", {}), "scale": ("INT", {})},
        IS_CHANGED=classmethod(lambda cls, value, scale: seen.append((value, scale))),
    )
    prompt.add("Number", value=3)
    prompt.add("Show", "show", value=[prompt.add("File", value=["1", 0], scale=2), 0])
    bench.run(prompt)
    assert bench.shown(prompt, "show") == [6] and toys.calls == []
    assert seen == [(None, 2)] * 2


def test_is_changed_may_be_asynchronous(bench, toys, prompt):
    async def changed(cls):
        await asyncio.sleep(0)
        return 1

    toys.add("File", lambda: (1,), IS_CHANGED=classmethod(changed))
    prompt.add("Show", "show", value=[prompt.add("File"), 0])
    bench.run(prompt)
    bench.run(prompt)
    assert toys.calls == []


def test_a_failing_is_changed_only_costs_the_cache(bench, toys, prompt, caplog):
    toys.add("File", lambda: (1,), IS_CHANGED=classmethod(lambda cls: 1 / 0))
    prompt.add("Show", "show", value=[prompt.add("File"), 0])
    bench.run(prompt)
    assert bench.shown(prompt, "show") == [1] and toys.calls == ["File", "Show"]
    assert "IS_CHANGED of node 1 (File) failed" in caplog.text


def test_classic_cache_keeps_the_last_prompt_only(bench, chain, toys):
    bench.run(chain)
    chain["1"]["inputs"]["value"] = 7
    bench.run(chain)
    chain["1"]["inputs"]["value"] = 2
    bench.run(chain)
    assert toys.calls == ["Number", "Add", "Show"]


def test_classic_cache_keeps_branches_outside_the_targets(bench, chain, toys):
    chain.add("Show", "other", value=["1", 0])
    bench.run(chain)
    bench.run(chain, targets=["other"])
    bench.run(chain)
    assert toys.calls == []


def test_lru_cache_keeps_earlier_prompts(bench, chain, toys):
    bench.use_cache("lru", 6)
    for value in (2, 7, 2):
        chain["1"]["inputs"]["value"] = value
        bench.run(chain)
    assert toys.calls == []
    chain["1"]["inputs"]["value"] = 8
    bench.run(chain)  # the results for 7 were unused for longest
    chain["1"]["inputs"]["value"] = 2
    bench.run(chain)
    assert toys.calls == []
    chain["1"]["inputs"]["value"] = 7
    bench.run(chain)
    assert toys.calls == ["Number", "Add", "Show"]


def test_no_cache(bench, chain, toys):
    bench.use_cache("none")
    bench.run(chain)
    assert bench.shown(chain, "3") == [5] and toys.calls == ["Number", "Add", "Show"]
    assert bench.events.of("execution_cached")[0]["nodes"] == []


def test_unknown_caches_are_refused(toys, bench):
    with pytest.raises(FluxError, match="use classic, none, or lru"):
        Executor(toys, bench.events, "ram")
    with pytest.raises(FluxError, match="size"):
        Executor(toys, bench.events, "lru", 0)


def test_free_lets_go_of_results(bench, toys, prompt):
    class Big:
        pass

    kept = []

    def make():
        big = Big()
        kept.append(weakref.ref(big))
        return (big,)

    toys.add("Big", make)
    toys.add_output("Look", lambda value: (), {"value": ("*", {})})
    prompt.add("Look", value=[prompt.add("Big"), 0])
    bench.run(prompt)
    gc.collect()
    assert kept[0]() is not None
    bench.executor.free()
    gc.collect()
    assert kept[0]() is None


def test_node_objects_are_kept_while_their_node_is_in_the_prompt(bench, toys, prompt):
    class Counter:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "count", True

        def __init__(self):
            self.runs = 0

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"seed": ("INT", {})}}

        def count(self, seed):
            self.runs += 1
            return {"ui": {"values": [self.runs]}}

    toys["Counter"] = Counter
    toys["Recounter"] = type("Recounter", (Counter,), {})
    prompt.add("Counter", seed=1)
    prompt.add("Number", value=1)
    assert bench.shown(prompt, "1") == [1]
    prompt["1"]["inputs"]["seed"] = 2
    assert bench.shown(prompt, "1") == [2]
    prompt["1"]["class_type"] = "Recounter"
    assert bench.shown(prompt, "1") == [1]
    prompt["3"] = prompt.pop("1")
    prompt["3"]["inputs"]["seed"] = 3
    assert bench.shown(prompt, "3") == [1]
    prompt["1"] = prompt.pop("3")
    prompt["1"]["inputs"]["seed"] = 4
    assert bench.shown(prompt, "1") == [1], "it was let go of when its node was not in the prompt"
