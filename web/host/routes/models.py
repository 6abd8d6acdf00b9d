"""What lies in the model folders."""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath
from typing import Any

from aiohttp import web

from ....flux_runtime.errors import FluxError
from ....flux_runtime.weights.header import read_header
from ..context import Context, context
from ..files import relative
from ..pictures import open_picture
from ..replies import complaint, reply
from .view import encoded

_PICTURES = (".preview.png", ".png", ".webp", ".jpg", ".jpeg")


def _names(here: Context, category: str) -> list[str]:
    """The models of a category, or 404 when there is no such category."""
    try:
        return here.folders.list(category)
    except FluxError as error:
        raise web.HTTPNotFound(text=str(error)) from error


async def list_categories(request: web.Request) -> web.Response:
    """The names of the model categories."""
    return reply(list(context(request).folders.categories()))


async def list_models(request: web.Request) -> web.Response:
    """The names of the models in a category."""
    return reply(await asyncio.to_thread(_names, context(request), request.match_info["category"]))


async def list_categories_with_folders(request: web.Request) -> web.Response:
    """The model categories with their folders."""
    categories = context(request).folders.categories()
    return reply([{"name": name, "folders": [str(root) for root in roots]} for name, roots in categories.items()])


def _details(here: Context, category: str) -> list[dict[str, Any]]:
    """The models of a category with the index of the folder they lie in, their size and times in seconds."""
    found = []
    for name in _names(here, category):
        for index, root in enumerate(here.folders.roots(category)):
            path = root / name
            if path.exists():
                stat = path.stat()
                found.append(
                    {
                        "name": name,
                        "pathIndex": index,
                        "modified": stat.st_mtime,
                        "created": stat.st_ctime,
                        "size": stat.st_size,
                    }
                )
                break
    return found


async def list_models_with_details(request: web.Request) -> web.Response:
    """The models of a category for the model library."""
    return reply(await asyncio.to_thread(_details, context(request), request.match_info["category"]))


def _picture_beside(path: Path) -> Path | None:
    """The thumbnail that people keep beside a model file."""
    beside = (path.with_name(path.stem + ending) for ending in _PICTURES)
    return next((picture for picture in beside if picture.is_file()), None)


def _thumbnail(here: Context, category: str, index: str, name: str) -> bytes | None:
    names = _names(here, category)
    roots = here.folders.roots(category)
    if name not in names or not index.isdecimal() or int(index) >= len(roots):
        return None
    picture = _picture_beside(roots[int(index)] / PurePosixPath(name))
    return encoded(open_picture(picture).convert("RGB"), "webp", quality=80) if picture else None


async def model_preview(request: web.Request) -> web.Response:
    """The thumbnail of a model as WebP."""
    given = request.match_info
    name = relative(given["name"])
    data = await asyncio.to_thread(_thumbnail, context(request), given["category"], given["index"], name)
    if data is None:
        return complaint(f"The model {name!r} has no preview picture.", status=404)
    return web.Response(body=data, content_type="image/webp")


async def view_metadata(request: web.Request) -> web.Response:
    """The metadata in the header of a .safetensors file; 404 when the model does not exist or has none."""
    here, category = context(request), request.match_info["category"]
    name = request.query.get("filename", "")
    if name not in await asyncio.to_thread(_names, here, category) or not name.endswith(".safetensors"):
        return complaint(f"There is no .safetensors model {name[:200]!r} in {category!r}.", status=404)
    header = await asyncio.to_thread(read_header, here.folders.resolve(category, name))
    if not header.metadata:
        return complaint(f"The model {name!r} carries no metadata.", status=404)
    return reply(dict(header.metadata))


async def embeddings(request: web.Request) -> web.Response:
    """The names of the text embeddings, without their file endings."""
    names = await asyncio.to_thread(_names, context(request), "embeddings")
    return reply([str(PurePosixPath(name).with_suffix("")) for name in names])


async def folder_paths(request: web.Request) -> web.Response:
    """Where models of each category belong: for the canvas's help with missing models."""
    categories = context(request).folders.categories()
    return reply({name: [str(root) for root in roots] for name, roots in categories.items()})


API = [
    web.get("/models", list_categories),
    web.get("/models/{category}", list_models),
    web.get("/experiment/models", list_categories_with_folders),
    web.get("/experiment/models/preview/{category}/{index}/{name:.*}", model_preview),
    web.get("/experiment/models/{category}", list_models_with_details),
    web.get("/view_metadata/{category}", view_metadata),
    web.get("/embeddings", embeddings),
]
PLAIN = [web.get("/internal/folder_paths", folder_paths)]
