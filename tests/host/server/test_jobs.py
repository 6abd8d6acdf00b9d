"""History and the jobs API."""

from __future__ import annotations

import time

import pytest

from fluxcanvas.web.host import jobs


@pytest.fixture
def ran(server, graph):
    """Three finished runs, oldest first: (server, their ids). The second fails."""
    ids = []
    for index, through in enumerate(([], ["ToyFail"], [])):
        end = "SaveImage" if index == 2 else "PreviewImage"
        _, reply = server.listen(graph(*through, end=end, red=index / 10))
        ids.append(reply.json()["prompt_id"])
        time.sleep(0.005)
    return server, ids


def test_history_has_comfyuis_shape(ran, graph):
    server, ids = ran
    history = server.get("/api/history").json()
    assert list(history) == ids
    entry = server.get(f"/history/{ids[0]}").json()[ids[0]]
    assert set(entry) >= {"prompt", "outputs", "status", "meta"}
    _, prompt_id, prompt, extra, outputs = entry["prompt"]
    assert prompt_id == ids[0] and prompt == graph(red=0.0) and extra["client_id"] == "me" and outputs == ["9"]
    assert entry["outputs"]["9"]["images"][0]["type"] == "temp"
    assert entry["status"]["status_str"] == "success" and entry["status"]["completed"] is True
    assert [name for name, _ in entry["status"]["messages"]] == [
        "execution_start",
        "execution_cached",
        "execution_success",
    ]
    assert entry["meta"]["9"]["node_id"] == "9"
    assert server.get("/history/unknown").json() == {}


def test_history_pages(ran):
    server, ids = ran
    assert list(server.get("/history", max_items=2).json()) == ids[1:]
    assert list(server.get("/history", max_items=1, offset=0).json()) == ids[:1]
    assert list(server.get("/history", max_items=1, offset=-1).json()) == ids[2:]
    assert list(server.get("/history", offset=1).json()) == ids[1:]
    assert server.get("/history", max_items="x").status == 400
    assert server.get("/history", max_items=-1).status == 400


def test_history_is_deleted_and_cleared(ran):
    server, ids = ran
    assert server.post("/history", {"delete": [ids[0], "unknown"]}).status == 200
    assert list(server.get("/history").json()) == ids[1:]
    server.post("/api/history", {"clear": True})
    assert server.get("/history").json() == {}


def test_jobs_are_listed_newest_first_and_paged(ran):
    server, ids = ran
    told = server.get("/api/jobs", limit=2).json()
    assert [job["id"] for job in told["jobs"]] == ids[:0:-1]
    assert told["pagination"] == {"offset": 0, "limit": 2, "total": 3, "has_more": True}
    rest = server.get("/jobs", limit=2, offset=2).json()
    assert [job["id"] for job in rest["jobs"]] == ids[:1] and rest["pagination"]["has_more"] is False
    everything = server.get("/jobs").json()
    assert everything["pagination"]["limit"] is None and len(everything["jobs"]) == 3
    assert [job["id"] for job in server.get("/jobs", sort_order="asc").json()["jobs"]] == ids
    assert [job["status"] for job in everything["jobs"]] == ["completed", "failed", "completed"]
    newest = everything["jobs"][0]
    assert newest["outputs_count"] == 1 and newest["preview_output"]["nodeId"] == "9"
    assert newest["preview_output"]["mediaType"] == "images" and newest["preview_output"]["type"] == "output"
    assert newest["create_time"] <= newest["execution_start_time"] <= newest["execution_end_time"]


@pytest.mark.parametrize(
    "query",
    [{"status": "done"}, {"limit": 0}, {"limit": "many"}, {"offset": -1}, {"sort_by": "size"}, {"sort_order": "up"}],
)
def test_wrong_job_queries_are_refused(server, query):
    reply = server.get("/jobs", **query)
    assert reply.status == 400 and reply.json()["error"].endswith(".")


def test_jobs_are_chosen_by_status_and_workflow(ran):
    server, ids = ran
    assert [job["id"] for job in server.get("/jobs", status="failed,cancelled").json()["jobs"]] == [ids[1]]
    assert server.get("/jobs", status="pending").json()["jobs"] == []
    assert server.get("/jobs", workflow_id="none").json()["jobs"] == []


def test_a_job_carries_its_workflow(server, graph):
    workflow = {"id": "w-1", "nodes": []}
    sent = {"prompt": graph(), "prompt_id": "one", "extra_data": {"extra_pnginfo": {"workflow": workflow}}}
    server.post("/prompt", sent)
    end = time.monotonic() + 20
    while server.get("/jobs/one").json()["status"] != "completed" and time.monotonic() < end:
        time.sleep(0.02)
    job = server.get("/jobs/one").json()
    assert job["workflow"]["prompt"] == graph()
    assert job["workflow"]["extra_data"]["extra_pnginfo"]["workflow"] == workflow
    assert job["workflow_id"] == "w-1" and job["execution_status"]["completed"] is True
    assert job["outputs"]["9"]["images"]
    assert server.get("/jobs/unknown").status == 404 and server.get("/jobs/unknown").json() == {
        "error": "Job not found"
    }


def test_cancel_works_on_waiting_running_and_ended_jobs(server, graph):
    for name in ("a", "b", "c"):
        server.post("/prompt", {"prompt": graph("ToyWait", red=ord(name) / 200), "prompt_id": name})
    end = time.monotonic() + 20
    while server.get("/jobs/a").json()["status"] != "in_progress" and time.monotonic() < end:
        time.sleep(0.02)
    assert server.request("POST", "/api/jobs/b/cancel").status == 200
    assert server.get("/jobs/b").status == 404
    assert server.post("/jobs/cancel", {"job_ids": ["a", "c", "unknown"]}).status == 200
    while server.get("/jobs/a").json()["status"] == "in_progress" and time.monotonic() < end:
        time.sleep(0.02)
    assert server.get("/jobs/a").json()["status"] == "cancelled"
    assert server.request("POST", "/jobs/a/cancel").status == 200


def test_an_output_that_is_saved_is_preferred_as_preview():
    entry = {
        "prompt": [1, "x", {}, {}, []],
        "status": {"status_str": "success", "messages": []},
        "meta": {},
        "outputs": {
            "1": {"images": [{"filename": "s.png", "type": "output"}]},
            "2": {"images": [{"filename": "t.png", "type": "temp"}], "text": ["words"]},
        },
    }
    job = jobs.finished_job("x", entry)
    assert job["preview_output"]["filename"] == "s.png" and job["outputs_count"] == 2
    assert "execution_error" not in job
