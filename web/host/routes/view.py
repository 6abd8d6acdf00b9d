"""Pictures and other files out of input, output and temp."""

from __future__ import annotations

import asyncio
import io
import os
from pathlib import Path

from aiohttp import web
from PIL import Image

from ..context import context
from ..files import contained
from ..pictures import eight_bit, open_picture
from ..replies import BadRequest, reply
from ..serving import disposition, file_reply

_CHANNELS = ("rgba", "rgb", "a")
_PREVIEWS = ("webp", "jpeg")


def _find(request: web.Request) -> Path:
    """The file that `filename`, `subfolder` and `type` name; 400 without a name, 404 when it does not exist."""
    folders, name = context(request).folders, request.query.get("filename", "")
    if not name:
        raise BadRequest("'filename' is missing: it names the file to view.")
    kind = request.query.get("type", "output")
    for annotation in ("input", "output", "temp"):
        if name.endswith(f"[{annotation}]"):
            name, kind = name[: -len(annotation) - 2].rstrip(), annotation
    path = contained(folders.directory(kind), request.query.get("subfolder", ""), name)
    if not path.is_file():
        raise web.HTTPNotFound(text=f"The {kind} folder has no file {name!r}.")
    return path


def _preview_choice(text: str) -> tuple[str, int]:
    """Format and quality out of `webp;75`."""
    kind, _, quality = text.partition(";")
    if kind not in _PREVIEWS:
        kind = "webp"
    return kind, min(max(int(quality), 1), 100) if quality.isdecimal() and len(quality) < 4 else 90


def encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    """A picture in the named format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind.upper(), **options)
    return buffer.getvalue()


def preview(path: Path, kind: str, quality: int, channel: str) -> bytes:
    """A picture in another format; JPEG has no transparency."""
    picture = eight_bit(open_picture(path))
    mode = "RGB" if kind == "jpeg" or channel == "rgb" else "RGBA"
    return encoded(picture.convert(mode), kind, quality=quality)


def one_channel(path: Path, channel: str) -> bytes:
    """PNG of the colours alone, or of the alpha channel alone (carried as alpha, as the mask editor reads it)."""
    picture = eight_bit(open_picture(path))
    if channel == "rgb":
        return encoded(picture.convert("RGB"), "png")
    alpha = Image.new("RGBA", picture.size)
    alpha.putalpha(picture.convert("RGBA").getchannel("A"))
    return encoded(alpha, "png")


async def view(request: web.Request) -> web.StreamResponse:
    """A file as it is, or a picture re-encoded (`preview=webp;75`) or reduced to a channel (`channel=rgb|a`)."""
    path = _find(request)
    channel = request.query.get("channel", "rgba")
    if channel not in _CHANNELS:
        raise BadRequest(f"'channel' must be one of {', '.join(_CHANNELS)}.")
    if "preview" in request.query:
        kind, quality = _preview_choice(request.query["preview"])
        data = await asyncio.to_thread(preview, path, kind, quality, channel)
    elif channel != "rgba":
        kind, data = "png", await asyncio.to_thread(one_channel, path, channel)
    else:
        return file_reply(path)
    name = f"{path.stem}.{kind}"
    return web.Response(
        body=data,
        content_type=f"image/{kind}",
        headers={"Content-Disposition": disposition("inline", name), "Cache-Control": "no-cache"},
    )


async def list_files(request: web.Request) -> web.Response:
    """The names of the files in input, output or temp, newest first."""
    folder = context(request).folders.directory(request.match_info["kind"])
    if not folder.is_dir():
        return reply([])
    entries = [entry for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith(".")]
    return reply([entry.name for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime_ns, reverse=True)])


API = [web.get("/view", view)]
PLAIN = [web.get("/internal/files/{kind}", list_files)]
