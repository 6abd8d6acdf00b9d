"""POST /prompt, the events of a run, the queue, interrupting."""

from __future__ import annotations

import io
import json
import struct
import time
from typing import Any

import pytest
from PIL import Image


def wait_until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def texts(messages: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(message["type"], message["data"]) for message in messages if isinstance(message, dict)]


def test_a_run_sends_the_events_in_order(server, graph):
    messages, reply = server.listen(graph(), flags={"supports_preview_metadata": True})
    told = reply.json()
    assert set(told) == {"prompt_id", "number", "node_errors"} and told["node_errors"] == {}
    events = texts(messages)
    assert events[0][0] == "status" and events[0][1]["sid"] == "me"
    assert events[1][0] == "feature_flags" and events[1][1]["supports_preview_metadata"] is True
    names = [name for name, _ in events[2:] if name not in ("status", "progress", "progress_state", "logs")]
    assert names == [
        "execution_start",
        "execution_cached",
        "executing",
        "executing",
        "executed",
        "execution_success",
        "executing",
    ]
    last = events[-1]
    assert last == (
        "executing",
        {
            "node": None,
            "prompt_id": told["prompt_id"],
            **{k: v for k, v in last[1].items() if k not in ("node", "prompt_id")},
        },
    )
    image = next(data for name, data in events if name == "executed")["output"]["images"][0]
    assert image["type"] == "temp"
    picture = Image.open(io.BytesIO(server.get("/view", **image).body))
    assert picture.size == (16, 16) and picture.getpixel((3, 3)) == (128, 0, 0)


def test_previews_carry_their_node(server, graph):
    messages, reply = server.listen(
        graph(), flags={"supports_preview_metadata": True, "supports_progress_text_metadata": True}
    )
    frames = [message for message in messages if isinstance(message, bytes)]
    previews = [frame for frame in frames if struct.unpack(">I", frame[:4])[0] == 4]
    length = struct.unpack(">I", previews[0][4:8])[0]
    metadata = json.loads(previews[0][8 : 8 + length])
    assert metadata["node_id"] == "1" and metadata["prompt_id"] == reply.json()["prompt_id"]
    assert metadata["image_type"] == "image/jpeg"
    assert Image.open(io.BytesIO(previews[0][8 + length :])).size == (8, 8)
    prompt_id = reply.json()["prompt_id"].encode()
    expected = struct.pack(">II", 3, len(prompt_id)) + prompt_id + struct.pack(">I", 1) + b"1" + b"made it"
    assert expected in frames


def test_a_client_without_flags_gets_plain_previews(server, graph):
    messages, _ = server.listen(graph())
    frames = [message for message in messages if isinstance(message, bytes)]
    assert {struct.unpack(">I", frame[:4])[0] for frame in frames} == {1, 3}
    plain = next(frame for frame in frames if frame[3] == 1)
    assert plain[4:8] == struct.pack(">I", 1) and plain[8:10] == b"\xff\xd8"
    assert struct.pack(">II", 3, 1) + b"1made it" in frames


def test_another_client_hears_only_broadcasts(server, graph):
    import asyncio

    import aiohttp

    async def both() -> list[str]:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{server.host}/ws?clientId=other") as ws,
        ):
            await asyncio.to_thread(server.listen, graph())
            await asyncio.to_thread(server.post, "/settings/a", 1)
            heard = []
            while True:
                try:
                    heard.append((await ws.receive_json(timeout=0.3))["type"])
                except (asyncio.TimeoutError, TimeoutError):
                    return heard

    assert set(asyncio.run(both())) == {"status"}


@pytest.mark.parametrize(
    "body, kind",
    [
        ({}, "no_prompt"),
        ({"prompt": None}, "no_prompt"),
        ({"prompt": {}}, "prompt_no_outputs"),
        ({"prompt": {"1": {"class_type": "NoSuchNode", "inputs": {}}}}, None),
        ({"prompt": []}, None),
        ({"prompt": "text"}, None),
        ({"prompt": 5}, None),
        ({"prompt": {"1": 5}}, None),
        ({"prompt": {"1": {"class_type": 7, "inputs": []}}}, None),
        ({"prompt": {"1": {"class_type": ["a"], "inputs": {}}}}, None),
        ({"prompt": {"9": {"class_type": "PreviewImage", "inputs": {"images": [["x"], {}]}}}}, None),
        ({"prompt": {"9": {"class_type": "PreviewImage", "inputs": {"images": ["9", 0]}}}}, None),
        ({"prompt": {"9": {"class_type": "PreviewImage", "inputs": None}}}, None),
        ([1, 2], None),
        ("x", None),
        (7, None),
    ],
)
def test_what_cannot_run_is_refused_in_the_canvas_form(server, graph, body, kind):
    reply = server.post("/api/prompt", body)
    told = reply.json()
    assert reply.status == 400
    assert set(told) == {"error", "node_errors"} and told["error"]["message"]
    assert {"type", "message", "details", "extra_info"} <= set(told["error"])
    assert kind in (None, told["error"]["type"])
    assert server.get("/queue").json() == {"queue_running": [], "queue_pending": []}


@pytest.mark.parametrize(
    "extra",
    [
        {"client_id": 5},
        {"client_id": ["a"]},
        {"prompt_id": {}},
        {"extra_data": [1]},
        {"extra_data": {"extra_pnginfo": [1]}},
        {"number": "soon"},
        {"number": [1]},
        {"number": float("nan")},
        {"partial_execution_targets": "9"},
        {"partial_execution_targets": [9]},
    ],
)
def test_wrong_types_beside_the_prompt_are_refused(server, graph, extra):
    reply = server.post("/prompt", {"prompt": graph(), **extra})
    assert reply.status == 400 and reply.json()["error"]["message"].endswith(".")


def test_node_errors_name_the_node(server, graph):
    prompt = graph()
    del prompt["9"]["inputs"]["images"]
    told = server.post("/prompt", {"prompt": prompt}).json()
    assert told["error"]["type"] == "prompt_outputs_failed_validation"
    error = told["node_errors"]["9"]
    assert error["class_type"] == "PreviewImage" and error["dependent_outputs"] == ["9"]
    assert error["errors"][0]["type"] == "required_input_missing"
    assert error["errors"][0]["extra_info"]["input_name"] == "images"


def test_absurd_json_is_refused_and_the_server_goes_on(server, graph):
    deep = b'{"prompt":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"
    lists = b'{"prompt":{"1":{"class_type":"ToyImage","inputs":{"red":' + b"[" * 5000 + b"]" * 5000 + b"}}}}"
    for body in (deep, lists, b"{", b"\xff\xfe", b'{"prompt":1' + b"0" * 10_000 + b"}"):
        reply = server.request("POST", "/prompt", body, Content_Type="application/json")
        assert reply.status == 400 and reply.json()["error"]["message"].endswith(".")
    assert server.listen(graph())[1].status == 200


def test_nesting_that_others_would_stumble_over_is_refused(server, graph):
    value: list = []
    for _ in range(300):  # json reads this, but what walks it later by recursion might not
        value = [value]
    reply = server.post("/prompt", {"prompt": graph(red={"__value__": value})})
    assert reply.status == 400 and "nested more than 100 levels" in reply.json()["error"]["message"]
    assert server.post("/settings/deep", value).status == 400


def test_a_prompt_of_ten_megabytes_is_refused_by_name(server, graph):
    reply = server.post("/prompt", {"prompt": graph(text="x" * 10_000_000)})
    assert reply.status == 400
    assert "'text' of node 1 (ToyImage)" in reply.json()["error"]["message"]
    assert server.request("POST", "/prompt", b"[" + b" " * (33 << 20) + b"]").status == 413
    assert server.get("/prompt").json() == {"exec_info": {"queue_remaining": 0}}


def test_the_queue_orders_deletes_and_interrupts(server, graph):
    first = server.post("/prompt", {"prompt": graph("ToyWait"), "prompt_id": "running"}).json()
    wait_until(lambda: server.get("/queue").json()["queue_running"])
    second = server.post("/prompt", {"prompt": graph(red=0.1), "prompt_id": "later"}).json()
    third = server.post("/prompt", {"prompt": graph(red=0.2), "prompt_id": "front", "front": True}).json()
    assert first["number"] < second["number"] and third["number"] < 0
    queue = server.get("/api/queue").json()
    assert [item[1] for item in queue["queue_running"]] == ["running"]
    assert [item[1] for item in queue["queue_pending"]] == ["front", "later"]
    assert (
        queue["queue_pending"][1][0] == second["number"]
        and queue["queue_pending"][1][2]["1"]["class_type"] == "ToyImage"
    )
    assert server.get("/prompt").json()["exec_info"]["queue_remaining"] == 3
    assert server.post("/prompt", {"prompt": graph(), "prompt_id": "later"}).status == 400
    server.post("/queue", {"delete": ["later", "unknown"]})
    assert [item[1] for item in server.get("/queue").json()["queue_pending"]] == ["front"]
    server.post("/interrupt", {"prompt_id": "front"})
    assert server.get("/queue").json()["queue_running"], "another prompt's id must not stop the running one"
    assert server.post("/interrupt").status == 200
    wait_until(lambda: "front" in server.get("/history").json())
    history = server.get("/history").json()
    assert history["running"]["status"] == {**history["running"]["status"], "status_str": "error", "completed": False}
    assert history["front"]["status"]["completed"] is True
    assert "later" not in history


def test_clear_and_free(server, graph):
    server.post("/prompt", {"prompt": graph("ToyWait"), "prompt_id": "running"})
    wait_until(lambda: server.get("/queue").json()["queue_running"])
    server.post("/prompt", {"prompt": graph()})
    assert server.post("/queue", {"clear": True}).status == 200
    assert server.get("/queue").json()["queue_pending"] == []
    assert server.post("/free", {"unload_models": True, "free_memory": True}).status == 200
    server.post("/interrupt")
    wait_until(lambda: not server.get("/queue").json()["queue_running"])


@pytest.mark.parametrize("path", ["/queue", "/history", "/interrupt", "/free", "/jobs/cancel"])
@pytest.mark.parametrize(
    "body",
    [
        [1],
        "text",
        {"delete": 5, "job_ids": 5, "prompt_id": [1], "clear": 0},
        {"delete": [{}], "job_ids": [1], "prompt_id": 1},
    ],
)
def test_steering_with_wrong_types_is_refused(server, path, body):
    reply = server.post(path, body)
    expected = {200} if path == "/free" and isinstance(body, dict) else {400}
    assert reply.status in expected
    if reply.status == 400:
        assert reply.json()["error"].endswith(".")


def test_a_node_that_fails_tells_why(server, graph):
    messages, reply = server.listen(graph("ToyFail"))
    error = next(data for name, data in texts(messages) if name == "execution_error")
    assert error["node_id"] == "2" and error["node_type"] == "ToyFail"
    assert "broken on purpose" in error["exception_message"] and error["traceback"]
    job = server.get(f"/api/jobs/{reply.json()['prompt_id']}").json()
    assert job["status"] == "failed" and "broken on purpose" in job["execution_error"]["exception_message"]


def test_a_reloaded_page_learns_what_runs(server, graph):
    import asyncio

    import aiohttp

    async def reconnect() -> list[Any]:
        async with aiohttp.ClientSession() as session:
            async with session.ws_connect(f"http://{server.host}/ws?clientId=tab"):
                server_reply = await asyncio.to_thread(
                    server.post, "/prompt", {"prompt": graph("ToyWait"), "client_id": "tab"}
                )
                assert server_reply.status == 200
                while not server.get("/queue").json()["queue_running"]:
                    await asyncio.sleep(0.02)
                await asyncio.sleep(0.3)
            async with session.ws_connect(f"http://{server.host}/ws?clientId=tab") as ws:
                return [await ws.receive_json(timeout=5) for _ in range(2)]

    status, executing = asyncio.run(reconnect())
    assert status["data"]["status"]["exec_info"]["queue_remaining"] == 1
    assert executing["type"] == "executing" and executing["data"]["node"] == "2"
    server.post("/interrupt")


def test_nonsense_on_the_websocket_is_ignored(server):
    import asyncio

    import aiohttp

    async def talk() -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"http://{server.host}/ws") as ws:
            sid = (await ws.receive_json(timeout=5))["data"]["sid"]
            assert sid
            for text in ("{", "[]", '"x"', '{"type": "feature_flags", "data": 5}', "[" * 100_000):
                await ws.send_str(text)
            await ws.send_bytes(b"\x00")
            return await ws.receive_json(timeout=5)

    assert asyncio.run(talk())["type"] == "feature_flags"
