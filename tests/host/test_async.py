"""Asynchronous nodes, and interruption of these and others."""

from __future__ import annotations

import asyncio
import threading

from fluxcanvas.nodes import host
from fluxcanvas.web.host.embedded import Interrupted, Interruption, executing


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


# Asynchronous nodes


def test_asynchronous_nodes_overlap(bench, prompt, toys):
    """Each node waits for the others: the prompt ends only if all three are under way together."""
    barrier = []

    async def meet(value):
        barrier.append(asyncio.Event())
        if len(barrier) == 3:
            for event in barrier:
                event.set()
        await barrier[value].wait()
        return (value,)

    toys.add("Meet", meet, toys.NUMBER)
    for value in range(3):
        prompt.add("Show", f"show {value}", value=[prompt.add("Meet", value=value), 0])
    result = bench.run(prompt)
    assert [result.outputs[f"show {value}"]["values"] for value in range(3)] == [[0], [1], [2]]
    bench.run(prompt)
    assert toys.calls == []


def test_the_calls_of_an_asynchronous_node_over_a_list_overlap(bench, prompt, toys):
    arrived = []

    async def meet(value):
        arrived.append(executing().call)
        while len(arrived) < 3:
            await asyncio.sleep(0)
        return (value,)

    toys.add("Meet", meet, toys.NUMBER)
    prompt.add("Show", "show", value=[prompt.add("Meet", value=[prompt.add("Numbers", "numbers", count=3), 0]), 0])
    assert bench.shown(prompt, "show") == [0, 1, 2]
    assert arrived == [0, 1, 2]


def test_other_nodes_run_while_an_asynchronous_one_waits(bench, prompt, toys):
    ready = {}

    async def wait():
        ready["event"] = asyncio.Event()
        await ready["event"].wait()
        return (1,)

    toys.add("Wait", wait)
    toys.add("Release", lambda: (ready["event"].set(),))
    prompt.add("Show", "released", value=[prompt.add("Release"), 0])
    prompt.add("Show", "waited", value=[prompt.add("Wait"), 0])
    assert bench.shown(prompt, "waited") == [1]
    assert toys.calls[:2] == ["Wait", "Release"]


def test_threads_of_a_node_belong_to_it(bench, prompt, toys, embedded):
    def work():
        thread = threading.Thread(target=lambda: host.current().progress(1, 2))
        thread.start()
        thread.join()
        return (1,)

    toys.add("Work", work)
    prompt.add("Show", value=[prompt.add("Work", "work"), 0])
    bench.run(prompt)
    assert [data["node"] for data in bench.events.of("progress")] == ["work"]
    assert executing() is None


def test_asynchronous_nodes_know_which_they_are(bench, prompt, toys, embedded):
    async def work(value):
        await asyncio.sleep(0)
        host.current().progress(value, 10)
        return (value,)

    toys.add("Work", work, toys.NUMBER)
    for value in (1, 2):
        prompt.add("Show", value=[prompt.add("Work", f"work {value}", value=value), 0])
    bench.run(prompt)
    assert {data["node"]: data["value"] for data in bench.events.of("progress")} == {"work 1": 1, "work 2": 2}


def test_asynchronous_nodes_in_an_expansion_overlap(bench, prompt, toys):
    arrived = []

    async def meet(value):
        arrived.append(value)
        while len(arrived) < 2:
            await asyncio.sleep(0)
        return (value,)

    toys.add("Meet", meet, toys.NUMBER)
    toys.add(
        "Both",
        lambda: {
            "result": (["sum", 0],),
            "expand": {
                "sum": node("Add", a=["m1", 0], b=["m2", 0]),
                "m1": node("Meet", value=1),
                "m2": node("Meet", value=2),
            },
        },
    )
    prompt.add("Show", "show", value=[prompt.add("Both"), 0])
    assert bench.shown(prompt, "show") == [3]


def test_an_error_ends_asynchronous_nodes(bench, prompt, toys):
    ended = []

    async def wait():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fail():
        await asyncio.sleep(0)
        raise TimeoutError("the operation had a timeout of 3 s")

    toys.add_output("Wait", wait, {})
    toys.add_output("Fail", fail, {})
    prompt.add("Wait")
    prompt.add("Fail", "fail")
    error = bench.error_of(bench.run(prompt))
    assert error["node_id"] == "fail" and "timeout" in error["exception_message"]
    assert ended == [True]
    del prompt["fail"], prompt["1"]
    prompt.add("Show", value=1)
    assert bench.run(prompt).status == "success"


def test_a_node_that_cancels_itself_fails(bench, prompt, toys):
    async def cancel():
        raise asyncio.CancelledError

    toys.add_output("Cancel", cancel, {})
    prompt.add("Cancel")
    assert "cancelled its own work" in bench.error_of(bench.run(prompt))["exception_message"]


def test_asynchronous_nodes_are_blocked_like_others(bench, prompt, toys):
    async def work(value):
        await asyncio.sleep(0)
        return (value + 100,)

    toys.add("Work", work, toys.NUMBER)
    prompt.add("Numbers", count=3)
    prompt.add("Block", value=["1", 0], at=1)
    prompt.add("Show", "show", value=[prompt.add("Work", value=["2", 0]), 0])
    assert bench.shown(prompt, "show") == [100, 102]


# Interruption


def test_a_node_stops_at_its_next_step(bench, prompt, toys, embedded):
    stop = Interruption()
    steps = []

    def work():
        for step in range(10):
            host.current().check_interrupt()
            steps.append(step)
            if step == 3:
                stop.set()
        return (1,)

    toys.add("Work", work)
    prompt.add("Show", "show", value=[prompt.add("Work", "work"), 0])
    result = bench.run(prompt, interruption=stop)
    assert result.status == "interrupted" and steps == [0, 1, 2, 3]
    assert bench.events.story()[-2:] == ["executing work", "execution_interrupted"]
    _, data, client = bench.events.events[-1]
    assert client is None
    assert {key: data[key] for key in ("prompt_id", "node_id", "node_type", "executed")} == {
        "prompt_id": "prompt",
        "node_id": "work",
        "node_type": "Work",
        "executed": [],
    }
    assert [name for name, _ in result.messages] == ["execution_start", "execution_cached", "execution_interrupted"]
    steps.clear()
    assert bench.run(prompt).status == "success", "an interruption is over with its prompt"


def test_a_node_that_does_not_look_is_followed_by_no_other(bench, chain, toys):
    stop = Interruption()
    toys.add("Number", lambda value: (stop.set(), value)[1:], toys.NUMBER)
    result = bench.run(chain, interruption=stop)
    assert result.status == "interrupted" and toys.calls == ["Number"]
    assert result.messages[-1][1]["executed"] == ["1"]
    bench.run(chain)
    assert toys.calls == ["Add", "Show"], "what was finished is kept"


def test_interruption_between_the_calls_over_a_list(bench, prompt, toys):
    stop = Interruption()
    toys.add_output("Work", lambda value: stop.set() if value == 1 else None, toys.NUMBER)
    prompt.add("Work", "work", value=[prompt.add("Numbers", "numbers", count=5), 0])
    assert bench.run(prompt, interruption=stop).status == "interrupted"
    assert toys.calls.count("Work") == 2


def test_interruption_wakes_a_prompt_that_waits(bench, prompt, toys):
    stop = Interruption()

    async def wait():
        threading.Thread(target=stop.set).start()
        await asyncio.Event().wait()

    toys.add_output("Wait", wait, {})
    prompt.add("Wait", "wait")
    result = bench.run(prompt, interruption=stop)
    assert result.status == "interrupted"
    assert result.messages[-1][1]["node_id"] == "wait"


def test_a_prompt_interrupted_before_it_begins(bench, chain, toys):
    stop = Interruption()
    stop.set()
    result = bench.run(chain, interruption=stop)
    assert result.status == "interrupted" and toys.calls == []
    assert result.messages[-1][1]["node_id"] == "3"


def test_a_key_pressed_on_the_terminal_interrupts(bench, prompt, toys):
    def press():
        raise KeyboardInterrupt

    toys.add_output("Work", press, {})
    prompt.add("Work")
    assert bench.run(prompt).status == "interrupted"


def test_the_host_knows_its_own_interruption(embedded):
    assert embedded.interrupted(Interrupted("stop"))
    assert not embedded.interrupted(RuntimeError("stop"))
