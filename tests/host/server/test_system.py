"""Nodes, models, templates, scripts, logs: what the canvas asks when it loads."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
from importlib import metadata

import aiohttp
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxcanvas.web.host.core_nodes import DISPLAY_NAMES

GETS = [
    "/prompt",
    "/queue",
    "/history",
    "/jobs",
    "/users",
    "/settings",
    "/extensions",
    "/object_info",
    "/system_stats",
    "/models",
    "/models/loras",
    "/experiment/models",
    "/experiment/models/loras",
    "/embeddings",
    "/i18n",
    "/workflow_templates",
    "/global_subgraphs",
    "/node_replacements",
    "/features",
    "/userdata?dir=workflows",
]
BARE = [
    "/internal/logs",
    "/internal/logs/raw",
    "/internal/folder_paths",
    "/internal/files/output",
    "/templates/index.json",
    "/templates/index_logo.json",
    "/scripts/app.js",
    "/user.css",
    "/extensions/toys.v1/toys.js",
    "/",
]


@pytest.mark.parametrize("path", GETS)
def test_api_routes_answer_bare_and_below_api(server, path):
    bare, below = server.get(path), server.get(f"/api{path}")
    assert bare.status == below.status == 200
    assert bare.headers["content-type"] == "application/json; charset=utf-8"
    if path != "/system_stats":
        assert bare.body == below.body


@pytest.mark.parametrize("path", BARE)
def test_other_routes_answer_bare_only(server, path):
    assert server.get(path).status == 200
    assert path == "/" or server.get(f"/api{path}").status == 404


def test_system_stats_name_the_installed_frontend(server):
    stats = server.get("/system_stats").json()
    assert stats["system"]["required_frontend_version"] == metadata.version("comfyui_frontend_package")
    assert {
        "os",
        "ram_total",
        "ram_free",
        "comfyui_version",
        "python_version",
        "pytorch_version",
        "embedded_python",
        "argv",
    } <= set(stats["system"])
    device = stats["devices"][0]
    assert device["type"] == "cpu" and 0 < device["vram_free"] <= device["vram_total"]
    assert {"name", "index", "torch_vram_total", "torch_vram_free"} <= set(device)


def test_object_info_lists_core_own_and_custom_nodes(server):
    info = server.get("/api/object_info").json()
    assert info["LoadImage"]["python_module"] == "nodes"
    assert info["FluxCanvas_Sample"]["python_module"] == "custom_nodes.fluxcanvas"
    toy = info["ToyImage"]
    assert toy["python_module"] == "custom_nodes.toys.v1" and toy["display_name"] == "Toy Image"
    assert toy["input_order"] == {"required": ["red", "size", "text"]}
    assert toy["output"] == ["IMAGE"] and toy["output_name"] == ["IMAGE"] and toy["output_is_list"] == [False]
    assert server.get("/object_info/ToyImage").json() == {"ToyImage": toy}
    assert server.get("/object_info/Unknown").json() == {}


def test_extensions_list_scripts_that_exist(server):
    scripts = server.get("/api/extensions").json()
    assert "/extensions/toys.v1/toys.js" in scripts
    assert any(script.startswith("/extensions/fluxcanvas/") for script in scripts)
    for script in scripts:
        reply = server.get(script)
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/javascript")


def test_help_pages_are_markdown(server):
    reply = server.get("/extensions/fluxcanvas/docs/FluxCanvas_Sample/en.md")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/markdown")
    assert server.get("/extensions/fluxcanvas/docs/FluxCanvas_Sample/xx.md").status == 404


def test_the_core_nodes_have_help_where_the_canvas_asks_for_it(server):
    for node_id in DISPLAY_NAMES:
        reply = server.get(f"/docs/{node_id}/en.md")
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/markdown")


def test_the_page_is_fresh_and_its_assets_are_kept(server):
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html") and page.headers["cache-control"] == "no-cache"
    import re

    asset = re.search(rb'src="\./(assets/index-[^"]+\.js)"', page.body)[1].decode()
    assert "immutable" in server.get(f"/{asset}").headers["cache-control"]
    assert server.get("/scripts/app.js").headers["cache-control"] == "no-cache"
    assert (
        server.get("/extensions/core/maskeditor.js").status == 200
        or server.get("/extensions/core/groupNode.js").status == 200
    )


def test_own_and_custom_templates(server):
    pack = server.base / "custom_nodes" / "toys.v1" / "example_workflows"
    pack.mkdir()
    (pack / "toy.json").write_text('{"nodes": []}')
    (pack / "toy.jpg").write_bytes(b"\xff\xd8")
    (pack / "notes.py").write_text("x = 1")
    assert server.get("/api/workflow_templates").json()["toys.v1"] == ["toy"]
    assert server.get("/api/workflow_templates/toys.v1/toy.json").json() == {"nodes": []}
    assert server.get("/api/workflow_templates/toys.v1/toy.jpg").headers["content-type"] == "image/jpeg"
    for absent in ("toys.v1/notes.py", "toys.v1/none.json", "none/toy.json", "fluxcanvas/none.jpg"):
        assert server.get(f"/api/workflow_templates/{absent}").status == 404


def test_translations_and_subgraphs_of_packs(server):
    pack = server.base / "custom_nodes" / "toys.v1"
    (pack / "locales" / "de").mkdir(parents=True)
    (pack / "locales" / "de" / "main.json").write_text('{"g": {"toy": "Spielzeug"}, "settings": {"a": 1}}')
    (pack / "locales" / "de" / "settings.json").write_text('{"b": 2}')
    (pack / "locales" / "de" / "commands.json").write_text("{broken")
    assert server.get("/api/i18n").json()["de"] == {"g": {"toy": "Spielzeug"}, "settings": {"a": 1, "b": 2}}
    (pack / "subgraphs").mkdir()
    (pack / "subgraphs" / "Pair.json").write_text('{"nodes": [1]}')
    ((key, entry),) = server.get("/api/global_subgraphs").json().items()
    assert entry == {"source": "custom_node", "name": "Pair", "info": {"node_pack": "custom_nodes.toys.v1"}}
    assert json.loads(server.get(f"/api/global_subgraphs/{key}").json()["data"]) == {"nodes": [1]}
    assert server.get("/api/global_subgraphs/none").status == 404


def test_models_are_listed_with_details_metadata_and_thumbnails(server):
    loras = server.base / "models" / "loras"
    (loras / "style").mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, loras / "style" / "ink.safetensors", metadata={"author": "me"})
    save_file({"a": torch.zeros(2)}, loras / "plain.safetensors")
    (loras / "broken.safetensors").write_bytes(b"\xff" * 64)
    (loras / "notes.txt").write_text("x")
    Image.new("RGB", (4, 4), "red").save(loras / "style" / "ink.png")
    assert server.get("/api/models/loras").json() == [
        "broken.safetensors",
        "plain.safetensors",
        "style/ink.safetensors",
    ]
    assert "loras" in server.get("/models").json() and server.get("/models/none").status == 404
    details = {entry["name"]: entry for entry in server.get("/experiment/models/loras").json()}
    assert details["style/ink.safetensors"]["pathIndex"] == 0 and details["style/ink.safetensors"]["size"] > 0
    assert (
        str(loras)
        in next(entry for entry in server.get("/experiment/models").json() if entry["name"] == "loras")["folders"]
    )
    assert server.get("/api/view_metadata/loras", filename="style/ink.safetensors").json() == {"author": "me"}
    for absent in ("plain.safetensors", "none.safetensors", "notes.txt", ""):
        assert server.get("/view_metadata/loras", filename=absent).status == 404
    assert server.get("/view_metadata/loras", filename="broken.safetensors").status == 400
    thumbnail = server.get("/experiment/models/preview/loras/0/style%2Fink.safetensors")
    assert Image.open(io.BytesIO(thumbnail.body)).format == "WEBP"
    assert server.get("/experiment/models/preview/loras/0/plain.safetensors").status == 404
    assert server.get("/experiment/models/preview/loras/7/style%2Fink.safetensors").status == 404
    assert server.get("/internal/folder_paths").json()["loras"][0] == str(loras)
    save_file({"a": torch.zeros(2)}, server.base / "models" / "embeddings" / "mood.safetensors")
    assert server.get("/embeddings").json() == ["mood"]


def test_the_log_is_kept_and_sent_to_who_asks(server):
    async def listen() -> list[dict]:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{server.host}/ws?clientId=log") as ws,
        ):
            await ws.receive_json(timeout=5)
            for enabled in (True, False):
                body = json.dumps({"enabled": enabled, "clientId": "log"}).encode()
                reply = await asyncio.to_thread(server.request, "PATCH", "/internal/logs/subscribe", body)
                assert reply.status == 200
                logging.getLogger("fluxcanvas").warning("line while %s", enabled)
            messages = [await ws.receive_json(timeout=5)]
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                messages.append(await ws.receive_json(timeout=0.3))
            return messages

    messages = asyncio.run(listen())
    assert [message["type"] for message in messages] == ["logs"]
    assert messages[0]["data"]["entries"][0]["m"].strip() == "line while True"
    raw = server.get("/internal/logs/raw").json()
    assert [entry["m"].strip() for entry in raw["entries"] if "line while" in entry["m"]] == [
        "line while True",
        "line while False",
    ]
    assert set(raw["size"]) == {"cols", "rows"} and "line while False" in server.get("/internal/logs").json()
    assert server.request("PATCH", "/internal/logs/subscribe", b'{"enabled": true}').status == 400


def test_a_failing_route_says_so_and_the_server_goes_on(server, monkeypatch):
    def fail() -> None:
        raise RuntimeError("internal detail")

    monkeypatch.setattr(server.context.queue, "remaining", fail)
    reply = server.get("/prompt")
    assert reply.status == 500 and "internal detail" not in reply.json()["error"]
    monkeypatch.undo()
    assert server.get("/prompt").status == 200
