"""What the host is and can do: nodes, system figures, features, logs."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from importlib import metadata
from typing import Any

from aiohttp import web

from .. import frontend
from ..context import context
from ..node_info import object_info
from ..replies import BadRequest, json_object, reply


async def get_object_info(request: web.Request) -> web.Response:
    """Every node's definition."""
    packs = context(request).packs
    return reply(await asyncio.to_thread(object_info, packs.nodes, packs.display_names))


async def get_object_info_of(request: web.Request) -> web.Response:
    """One node's definition as `{id: entry}`, `{}` when there is none, as API clients of ComfyUI expect it."""
    packs, node_id = context(request).packs, request.match_info["node_id"]
    nodes = {node_id: packs.nodes[node_id]} if node_id in packs.nodes else {}
    return reply(await asyncio.to_thread(object_info, nodes, packs.display_names))


def _ram() -> tuple[int, int]:
    """Total and free bytes of memory; zeros where the system does not tell."""
    try:
        import psutil
    except ModuleNotFoundError:
        return _ram_of_posix()
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _ram_of_posix() -> tuple[int, int]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0


def _device(name: str | None, ram: tuple[int, int]) -> dict[str, Any]:
    """The computing device as the canvas's About page shows it; without a GPU its memory is the machine's."""
    import torch

    cuda = torch.cuda.is_available() and (name is None or name.startswith("cuda"))
    if not cuda:
        kind = name or ("mps" if torch.backends.mps.is_available() else "cpu")
        total, free, reserved, title, index = *ram, ram[0], kind, None
    else:
        chosen = torch.device(name or "cuda")
        index = chosen.index or 0
        free, total = torch.cuda.mem_get_info(chosen)
        reserved, kind, title = torch.cuda.memory_reserved(chosen), "cuda", torch.cuda.get_device_name(chosen)
    return {
        "name": title,
        "type": kind,
        "index": index,
        "vram_total": total,
        "vram_free": free,
        "torch_vram_total": reserved,
        "torch_vram_free": free if not cuda else 0,
    }


def version() -> str:
    """The version of the host."""
    try:
        return metadata.version("fluxcanvas")
    except metadata.PackageNotFoundError:
        return "0.0.0"


def stats(device: str | None) -> dict[str, Any]:
    """The figures of /system_stats. The frontend version "required" is the installed one: they are pinned together."""
    import torch

    ram = _ram()
    system = {
        "os": sys.platform,
        "ram_total": ram[0],
        "ram_free": ram[1],
        "comfyui_version": version(),
        "required_frontend_version": frontend.version(),
        "installed_templates_version": None,
        "required_templates_version": None,
        "python_version": f"{platform.python_version()} ({sys.platform})",
        "pytorch_version": torch.__version__,
        "embedded_python": False,
        "argv": ["fluxcanvas", *sys.argv[1:]],
    }
    return {"system": system, "devices": [_device(device, ram)]}


async def system_stats(request: web.Request) -> web.Response:
    """Versions, memory and devices."""
    return reply(await asyncio.to_thread(stats, context(request).options.device))


async def features(request: web.Request) -> web.Response:
    """What this server supports beyond the basics."""
    return reply(context(request).events.features)


async def node_replacements(request: web.Request) -> web.Response:
    """No node has been replaced by another."""
    return reply({})


async def logs_text(request: web.Request) -> web.Response:
    """The log as one text."""
    return reply("".join(f"{entry['t']} - {entry['m']}" for entry in context(request).logs.entries()))


async def logs_raw(request: web.Request) -> web.Response:
    """The log line by line, and the size of the terminal that shows it."""
    return reply({"entries": context(request).logs.entries(), "size": {"cols": 120, "rows": 40}})


async def logs_subscribe(request: web.Request) -> web.Response:
    """Send new log lines to a client over its WebSocket, or stop."""
    body = await json_object(request)
    client_id = body.get("clientId")
    if not isinstance(client_id, str) or not client_id:
        raise BadRequest("'clientId' must name the client that wants the log.")
    context(request).logs.subscribe(client_id[:200], body.get("enabled") is True)
    return web.Response()


async def websocket(request: web.Request) -> web.StreamResponse:
    """The event socket."""
    return await context(request).events.handle(request)


API = [
    web.get("/object_info", get_object_info),
    web.get("/object_info/{node_id}", get_object_info_of),
    web.get("/system_stats", system_stats),
    web.get("/features", features),
    web.get("/node_replacements", node_replacements),
]
PLAIN = [
    web.get("/ws", websocket, allow_head=False),
    web.get("/internal/logs", logs_text),
    web.get("/internal/logs/raw", logs_raw),
    web.patch("/internal/logs/subscribe", logs_subscribe),
]
