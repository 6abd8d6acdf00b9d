"""The canvas's page and files, the packs' browser scripts, and the help pages."""

from __future__ import annotations

import asyncio
from pathlib import Path

from aiohttp import web

from .. import frontend
from ..context import Context, context
from ..files import contained
from ..packs import OWN
from ..replies import reply
from ..serving import code_reply

_CORE = "core"


def _scripts(here: Context) -> list[str]:
    """The URLs of all scripts below the packs' web folders: the canvas loads every one."""
    return [
        f"/extensions/{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in here.packs.web_folders().items()
        for path in sorted(folder.rglob("*.js"))
    ]


async def extensions(request: web.Request) -> web.Response:
    """The packs' scripts."""
    return reply(await asyncio.to_thread(_scripts, context(request)))


def _found(folder: Path | None, name: str) -> Path:
    """A file in a folder, or 404."""
    path = contained(folder, name) if folder is not None and name else None
    if path is None or not path.is_file():
        raise web.HTTPNotFound()
    return path


async def extension_file(request: web.Request) -> web.StreamResponse:
    """A file of a pack's web folder; `core` is the canvas's own."""
    pack, name = request.match_info["pack"], request.match_info["name"]
    if pack == _CORE:
        return code_reply(_found(frontend.static_folder() / "extensions" / _CORE, name))
    return code_reply(_found(context(request).packs.web_folders().get(pack), name))


async def help_page(request: web.Request) -> web.StreamResponse:
    """The help of a node under a core id; pages of packs' nodes are among their extension files."""
    web_folder = context(request).packs.web_folders().get(OWN)
    return code_reply(_found(web_folder and web_folder / "docs", request.match_info["name"]))


async def page(request: web.Request) -> web.StreamResponse:
    """The canvas."""
    response = code_reply(frontend.static_folder() / "index.html")
    response.headers["Content-Type"] = "text/html; charset=utf-8"
    response.headers["Content-Security-Policy"] = frontend.content_policy(request.host)
    return response


async def frontend_file(request: web.Request) -> web.StreamResponse:
    """A file of the canvas; a true 404 for whatever else was asked: a page in its place would look like an answer."""
    path = _found(frontend.static_folder(), request.match_info["name"])
    if path.name == "index.html":
        return await page(request)
    return code_reply(path, frontend.cache_control(path))


API = [web.get("/extensions", extensions)]
PLAIN = [
    web.get("/extensions/{pack}/{name:.+}", extension_file),
    web.get("/docs/{name:.+}", help_page),
    web.get("/", page),
    web.get("/{name:.+}", frontend_file),
]
