"""The queue: order, cancelling, history; and the worker thread, which nothing that a prompt does can stop."""

from __future__ import annotations

import threading

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.nodes import host
from fluxcanvas.web.host.embedded import Interrupted
from fluxcanvas.web.host.executor import ExecutionResult
from fluxcanvas.web.host.queue import Chore, PromptQueue, QueueItem, Worker

LIMIT = 20.0  # s that a test waits for the worker before it fails


@pytest.fixture
def queue(bench):
    return PromptQueue(bench.events)


def put(queue, *names, **options):
    return [queue.put(name, {}, {}, ["1"], **options) for name in names]


def names(items):
    return [item.prompt_id for item in items]


def finish(queue, status="success", outputs=None, messages=()):
    """Take the next prompt and put it into history."""
    item = queue.get(0)
    queue.done(item, ExecutionResult(status, outputs or {}, list(messages), {}))
    return item


def remaining(bench):
    """The states of the queue that were broadcast."""
    assert all(client is None for name, _, client in bench.events.events if name == "status")
    return [data["status"]["exec_info"]["queue_remaining"] for data in bench.events.of("status")]


def test_prompts_run_in_the_order_in_which_they_came(queue):
    assert put(queue, "a", "b", "c") == [0, 1, 2]
    assert names(queue.pending()) == ["a", "b", "c"]
    assert [queue.get(0).prompt_id for _ in range(3)] == ["a", "b", "c"]
    assert names(queue.running()) == ["a", "b", "c"] and queue.pending() == []
    assert queue.get(0) is None


def test_front_goes_ahead_of_the_queue(queue):
    put(queue, "a", "b")
    assert put(queue, "first", front=True)[0] < 0
    put(queue, "before that", front=True)
    assert names(queue.pending()) == ["before that", "first", "a", "b"]


def test_front_goes_ahead_of_low_numbers_too(queue):
    put(queue, "low", number=-1000.5)
    put(queue, "first", front=True)
    assert names(queue.pending()) == ["first", "low"]


def test_numbers_decide_and_equal_ones_keep_their_order(queue):
    put(queue, "a", "b")
    assert put(queue, "between", "after", number=0.5) == [0.5, 0.5]
    assert put(queue, "late", number=100) == [100]
    assert names(queue.pending()) == ["a", "between", "after", "b", "late"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_must_be_one(queue, number):
    with pytest.raises(FluxError, match="finite"):
        put(queue, "a", number=number)
    assert queue.remaining() == 0


def test_an_id_is_in_the_queue_once(queue):
    put(queue, "a")
    with pytest.raises(FluxError, match="id a is in the queue already"):
        put(queue, "a")
    item = queue.get(0)
    with pytest.raises(FluxError, match="already"):
        put(queue, "a")
    queue.done(item, ExecutionResult("success", {}, [], {}))
    put(queue, "a")
    assert names(queue.pending()) == ["a"]


def test_items_look_like_comfyuis(queue):
    queue.put("a", {"1": {}}, {"client": "x"}, ["1"], "client")
    item = queue.pending()[0]
    assert item.as_list() == [0, "a", {"1": {}}, {"client": "x", "create_time": item.create_time}, ["1"]]
    assert item.client_id == "client"


def test_tokens_are_for_nodes_alone(queue):
    extra_data = {"auth_token_comfy_org": "secret", "api_key_comfy_org": "secret", "extra_pnginfo": {"workflow": {}}}
    queue.put("a", {}, extra_data, [])
    assert extra_data["auth_token_comfy_org"] == "secret", "the caller's data is left alone"
    assert queue.pending()[0].tokens == {"auth_token_comfy_org": "secret", "api_key_comfy_org": "secret"}
    assert "secret" not in repr(queue.pending()[0])
    finish(queue)
    assert "secret" not in repr(queue.history())
    assert queue.history()["a"]["prompt"][3]["extra_pnginfo"] == {"workflow": {}}


def test_every_change_is_broadcast(queue, bench):
    put(queue, "a", "b", "c")
    queue.get(0)
    queue.delete("b")
    queue.clear()
    assert remaining(bench) == [1, 2, 3, 3, 2, 1]
    assert queue.remaining() == 1


def test_delete_and_clear_leave_what_runs(queue, bench):
    put(queue, "a", "b", "c", "d")
    queue.get(0)
    assert queue.delete("c") and names(queue.pending()) == ["b", "d"]
    assert not queue.delete("c") and not queue.delete("a")
    queue.clear()
    assert queue.pending() == [] and names(queue.running()) == ["a"]


def test_deleting_keeps_the_order(queue):
    for number in (0, 5, 1, 6, 7, 2, 3):
        put(queue, f"{number}", number=number)
    queue.delete("0")
    queue.delete("6")
    assert [queue.get(0).prompt_id for _ in range(5)] == list("12357")


def test_interrupt_reaches_only_what_runs(queue):
    assert not queue.interrupt()
    put(queue, "a", "b")
    assert not queue.interrupt("a")
    item = queue.get(0)
    assert not queue.interrupt("b") and not item.interruption.is_set()
    assert queue.interrupt("a") and item.interruption.is_set()
    other = queue.get(0)
    assert queue.interrupt() and other.interruption.is_set()


def test_history_has_comfyuis_shape(queue):
    put(queue, "a")
    finish(queue, outputs={"1": {"images": []}}, messages=[("execution_start", {"prompt_id": "a"})])
    put(queue, "b", "c")
    finish(queue, "error")
    finish(queue, "interrupted", messages=[("execution_interrupted", {})])
    history = queue.history()
    assert list(history) == ["a", "b", "c"]
    assert set(history["a"]) == {"prompt", "outputs", "status", "meta"}
    assert history["a"]["prompt"][:3] == [0, "a", {}]
    assert history["a"]["outputs"] == {"1": {"images": []}}
    assert history["a"]["status"] == {
        "status_str": "success", "completed": True, "messages": [["execution_start", {"prompt_id": "a"}]]}
    assert history["b"]["status"] == {"status_str": "error", "completed": False, "messages": []}
    assert history["c"]["status"] == {
        "status_str": "error", "completed": False, "messages": [["execution_interrupted", {}]]}


@pytest.mark.parametrize("options, page", [
    ({}, "abcde"), ({"offset": 0}, "abcde"), ({"max_items": 2}, "de"), ({"max_items": 2, "offset": 0}, "ab"),
    ({"max_items": 2, "offset": 2}, "cd"), ({"max_items": 9, "offset": 3}, "de"), ({"offset": 2}, "cde"),
    ({"offset": 5}, ""), ({"offset": 100}, ""), ({"max_items": 0}, ""), ({"max_items": 100}, "abcde"),
    ({"max_items": 2, "offset": -1}, "de"), ({"max_items": -3}, ""),
    ({"prompt_id": "c"}, "c"), ({"prompt_id": "x"}, ""),
])
def test_pages_of_history(queue, options, page):
    put(queue, *"abcde")
    for _ in range(5):
        finish(queue)
    assert "".join(queue.history(**options)) == page


def test_history_is_capped_and_can_be_forgotten(bench):
    queue = PromptQueue(bench.events, history_limit=3)
    put(queue, *"abcde")
    for _ in range(5):
        finish(queue)
    assert "".join(queue.history()) == "cde"
    assert queue.delete_history("d") and not queue.delete_history("d")
    assert "".join(queue.history()) == "ce"
    queue.clear_history()
    assert queue.history() == {}
    assert PromptQueue()._limit == 10_000


def test_a_prompt_that_runs_again_is_the_newest(queue):
    put(queue, "a", "b")
    finish(queue)
    finish(queue)
    put(queue, "a")
    finish(queue)
    assert list(queue.history()) == ["b", "a"]


def test_the_end_of_a_prompt_is_told_last(queue, bench):
    queue.put("a", {}, {}, [], "client")
    finish(queue)
    assert bench.events.events[-2][0] == "status"
    assert bench.events.events[-1] == ("executing", {"node": None, "prompt_id": "a"}, "client")
    put(queue, "nobody's")
    finish(queue)
    assert bench.events.events[-1][0] == "status"


def test_free_comes_before_the_next_prompt(queue):
    put(queue, "a")
    queue.free()
    queue.free(unload_models=True)
    queue.free(free_memory=True)
    assert queue.get(0) is Chore.FREE_MEMORY
    assert isinstance(queue.get(0), QueueItem)


def test_a_closed_queue_gives_nothing(queue):
    put(queue, "a")
    queue.close()
    assert queue.get() is None and names(queue.pending()) == ["a"]


# The worker


@pytest.fixture
def line(bench, queue, toys, embedded):
    """A worker on the toys, and a prompt of one node Work that does what the test says."""
    line = Line(bench, queue, Worker(queue, bench.executor))
    toys.add_output("Work", lambda seed: line.work(seed), {"seed": ("INT", {})})
    yield line
    line.go_on.set()
    line.worker.stop(LIMIT)


class Line:
    """Queues prompts and waits for them."""

    def __init__(self, bench, queue, worker):
        self.bench, self.queue, self.worker = bench, queue, worker
        self.began, self.go_on = threading.Event(), threading.Event()
        self.ended = {}
        self.work = lambda seed: {"ui": {"values": [seed]}}
        done = queue.done

        def note(item, result):
            done(item, result)
            self.ended[item.prompt_id].set()

        queue.done = note

    def put(self, name, seed=0, **options):
        self.ended[name] = threading.Event()
        prompt = {"1": {"class_type": "Work", "inputs": {"seed": seed}}}
        self.queue.put(name, prompt, options.pop("extra_data", {}), ["1"], "client", **options)

    def wait(self, *names):
        assert all(self.ended[name].wait(LIMIT) for name in names)
        return [self.queue.history(prompt_id=name)[name] for name in names]

    def hold(self, seed):
        """Work that lasts until the test lets it go on, or stops it."""
        self.began.set()
        while not self.go_on.wait(0.005):
            host.current().check_interrupt()
        return {"ui": {"values": [seed]}}


def test_the_worker_runs_what_is_queued(line):
    line.worker.start()
    line.put("a", 1)
    line.put("b", 2)
    first, second = line.wait("a", "b")
    assert first["outputs"] == {"1": {"values": [1]}} and second["outputs"] == {"1": {"values": [2]}}
    assert first["status"]["status_str"] == "success"
    assert line.queue.remaining() == 0


def test_the_events_of_a_queued_prompt_in_order(line):
    line.put("a")
    line.worker.start()
    line.wait("a")
    assert line.bench.events.story() == [
        "status", "status", "execution_start", "execution_cached",
        "progress_state", "executing 1", "executed 1", "progress_state",
        "execution_success", "status", "executing None"]
    assert remaining(line.bench) == [1, 1, 0]


def fail(seed):
    raise [RuntimeError("broken"), SystemExit(), KeyboardInterrupt(), MemoryError(), Interrupted("stop")][seed]


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_that_fails_takes_no_other_with_it(line, seed):
    line.work = lambda value: fail(value) if value < 5 else {"ui": {"values": [value]}}
    line.put("bad", seed)
    line.put("good", 5)
    line.worker.start()
    bad, good = line.wait("bad", "good")
    assert bad["status"]["status_str"] == "error" and not bad["status"]["completed"]
    assert good["outputs"] == {"1": {"values": [5]}}


def test_a_fault_of_the_host_takes_no_other_prompt_with_it(line, monkeypatch, caplog):
    execute = line.bench.executor.execute

    def broken(prompt_id, *rest, **options):
        if prompt_id == "bad":
            raise RuntimeError("a fault of our own")
        return execute(prompt_id, *rest, **options)

    monkeypatch.setattr(line.bench.executor, "execute", broken)
    line.put("bad")
    line.put("good", 5)
    line.worker.start()
    bad, good = line.wait("bad", "good")
    assert bad["status"]["status_str"] == "error" and good["status"]["completed"]
    assert "a fault of our own" in caplog.text


def test_interrupting_stops_the_running_prompt_alone(line):
    line.work = lambda seed: line.hold(seed) if seed else {"ui": {"values": [seed]}}
    line.worker.start()
    line.put("held", 1)
    line.put("next", 0)
    assert line.began.wait(LIMIT)
    assert not line.queue.interrupt("next")
    assert line.queue.interrupt("held")
    held, following = line.wait("held", "next")
    assert held["status"]["status_str"] == "error"
    assert held["status"]["messages"][-1][0] == "execution_interrupted"
    assert held["status"]["messages"][-1][1]["node_id"] == "1"
    assert following["status"]["completed"]


def test_tokens_reach_the_nodes(line, toys):
    seen = []
    toys.add_output("Work", lambda seed, token: seen.append(token), {"seed": ("INT", {})},
                    hidden={"token": "AUTH_TOKEN_COMFY_ORG"})
    line.put("a", extra_data={"auth_token_comfy_org": "secret"})
    line.worker.start()
    line.wait("a")
    assert seen == ["secret"]


def test_free_lets_go_of_results_between_prompts(line, toys):
    line.worker.start()
    line.put("a", 1)
    line.wait("a")
    line.put("cached", 1)
    line.wait("cached")
    line.queue.free(free_memory=True)
    line.put("b", 1)
    line.wait("b")
    assert toys.calls == ["Work", "Work"]


def test_no_prompt_runs_before_packages_are_imported_or_could_not_be(line, monkeypatch):
    told = []
    monkeypatch.setattr("fluxcanvas.web.host.queue.warm_up", lambda: told.append("imported") or 1 / 0)
    line.work = lambda seed: told.append("run")
    line.put("a", 1)
    line.queue.ask(Chore.WARM_UP)
    line.worker.start()
    line.wait("a")
    assert told == ["imported", "run"]


def test_stopping_ends_the_thread_and_keeps_what_waits(line):
    line.work = line.hold
    line.worker.start()
    line.put("held", 1)
    line.put("waiting", 2)
    assert line.began.wait(LIMIT)
    line.worker.stop(LIMIT)
    held, = line.wait("held")
    assert held["status"]["messages"][-1][0] == "execution_interrupted"
    assert names(line.queue.pending()) == ["waiting"]
    assert not line.worker._thread.is_alive()


def test_many_threads_may_queue_at_once(line):
    line.worker.start()
    threads = [threading.Thread(target=line.put, args=(f"prompt {index}", index)) for index in range(20)]
    for index in range(20):
        line.ended[f"prompt {index}"] = threading.Event()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    entries = line.wait(*[f"prompt {index}" for index in range(20)])
    assert [entry["outputs"]["1"]["values"] for entry in entries] == [[index] for index in range(20)]
    assert len({entry["prompt"][0] for entry in entries}) == 20
