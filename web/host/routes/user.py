"""Settings, the one user, and the files that the canvas keeps for them."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ..context import context
from ..replies import complaint, flag, json_body, json_object, reply
from ..serving import file_reply
from ..userdata import Conflict, Missing

_STYLE = "user.css"
# Files that the page asks for by itself: absent they are empty, not an error in the browser's console.
_EMPTY = {
    _STYLE: ("text/css", ""),
    "comfy.templates.json": ("application/json", "[]"),
    "workflows/.index.json": ("application/json", "{}"),  # the bookmarked workflows
}


async def get_users(request: web.Request) -> web.Response:
    """There is one user, whose data lies on the server."""
    return reply({"storage": "server", "migrated": True})


async def get_settings(request: web.Request) -> web.Response:
    """All settings."""
    return reply(context(request).settings.all())


async def post_settings(request: web.Request) -> web.Response:
    """Change several settings."""
    context(request).settings.update(await json_object(request))
    return web.Response()


async def get_setting(request: web.Request) -> web.Response:
    """One setting, null when it has no value."""
    return reply(context(request).settings.get(request.match_info["name"]))


async def post_setting(request: web.Request) -> web.Response:
    """Change one setting; the body is its bare JSON value."""
    context(request).settings.update({request.match_info["name"]: await json_body(request)})
    return web.Response()


async def list_files(request: web.Request) -> web.Response:
    """The files of a folder: names, or with `full_info` sizes and times."""
    folder = request.query.get("dir", "")
    if not folder:
        return complaint("'dir' is missing: it names the folder to list.")
    try:
        return reply(
            context(request).userdata.list(
                folder, flag(request, "recurse"), flag(request, "full_info"), flag(request, "split")
            )
        )
    except Missing:
        return complaint(f"There is no folder {folder!r} yet.", status=404)


async def get_file(request: web.Request) -> web.StreamResponse:
    """A stored file."""
    name = request.match_info["name"]
    try:
        path = context(request).userdata.existing(name)
    except Missing:
        kind, text = _EMPTY.get(name, ("", ""))
        return web.Response(text=text, content_type=kind) if kind else _missing(name)
    if name == _STYLE:
        return web.FileResponse(path, headers={"Content-Type": "text/css", "Cache-Control": "no-cache"})
    return file_reply(path)


def _missing(name: str) -> web.Response:
    return complaint(f"There is no file {name[:200]!r}.", status=404)


async def post_file(request: web.Request) -> web.Response:
    """Store the body as a file; 409 when it is there and `overwrite=false`."""
    name, userdata = request.match_info["name"], context(request).userdata
    try:
        await asyncio.to_thread(userdata.write, name, await request.read(), flag(request, "overwrite", True))
    except Conflict:
        return complaint(f"{name!r} exists already; save under another name or overwrite it.", status=409)
    return reply(userdata.entry(name, flag(request, "full_info")))


async def delete_file(request: web.Request) -> web.Response:
    """Remove a file."""
    try:
        context(request).userdata.delete(request.match_info["name"])
    except Missing:
        return _missing(request.match_info["name"])
    return web.Response(status=204)


async def move_file(request: web.Request) -> web.Response:
    """Rename a file; 409 when the target is there and `overwrite=false`."""
    source, target, userdata = request.match_info["name"], request.match_info["target"], context(request).userdata
    try:
        userdata.move(source, target, flag(request, "overwrite", True))
    except Missing:
        return _missing(source)
    except Conflict:
        return complaint(f"{target!r} exists already; choose another name or overwrite it.", status=409)
    return reply(userdata.entry(target, flag(request, "full_info")))


async def user_style(request: web.Request) -> web.StreamResponse:
    """The user's own style sheet, empty when there is none."""
    request.match_info["name"] = _STYLE
    return await get_file(request)


API = [
    web.get("/users", get_users),
    web.get("/settings", get_settings),
    web.post("/settings", post_settings),
    web.get("/settings/{name}", get_setting),
    web.post("/settings/{name}", post_setting),
    web.get("/userdata", list_files),
    web.get("/userdata/{name}", get_file),
    web.post("/userdata/{name}", post_file),
    web.delete("/userdata/{name}", delete_file),
    web.post("/userdata/{name}/move/{target}", move_file),
]
PLAIN = [web.get(f"/{_STYLE}", user_style)]
