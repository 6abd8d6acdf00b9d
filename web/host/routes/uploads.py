"""Pictures that the browser sends: for LoadImage, from the clipboard, from the mask editor."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from PIL.PngImagePlugin import PngInfo

from ..context import Context, context
from ..core_nodes import file_hash
from ..files import Taken, contained, relative, write_atomic
from ..pictures import SUFFIXES, eight_bit, open_picture
from ..replies import BadRequest, parse_json, reply

_MANY = 10_000


async def _form(request: web.Request) -> tuple[web.FileField, Mapping[str, Any]]:
    """The form's picture and its fields; BadRequest when there is no picture in it."""
    if request.content_type != "multipart/form-data":
        raise BadRequest("An upload must be a multipart form with the picture in its field 'image'.")
    try:
        form = await request.post()
    except (ValueError, AssertionError, HttpProcessingError) as error:  # what aiohttp raises for a malformed form
        raise BadRequest(f"The upload's form is malformed: {getattr(error, 'message', error)!s:.100}.") from error
    image = form.get("image")
    if not isinstance(image, web.FileField) or not image.filename:
        raise BadRequest("The upload has no picture in its field 'image'.")
    return image, form


def _text(form: Mapping[str, Any], name: str, default: str = "") -> str:
    value = form.get(name, default)
    if not isinstance(value, str):
        raise BadRequest(f"The form's field {name!r} must be text.")
    return value


def _target(here: Context, filename: str, form: Mapping[str, Any]) -> tuple[Path, str, str]:
    """Where the upload goes: (path, sub-folder, "input" | "output" | "temp")."""
    kind, below = _text(form, "type") or "input", relative(_text(form, "subfolder"))
    name = relative(filename)
    if "/" in name or not name or name.startswith("."):
        raise BadRequest(f"{filename[:80]!r} is no plain file name.")
    if Path(name).suffix.lower() not in SUFFIXES:
        raise BadRequest(f"{filename[:80]!r} is not a picture file; its name must end in one of {', '.join(SUFFIXES)}.")
    return contained(here.folders.directory(kind), below, name), below, kind


def _store(path: Path, data: bytes, overwrite: bool) -> str:
    """Write the picture and return the name it got: `a.png`, else `a (1).png` ..., else that of an equal picture."""
    if overwrite:
        write_atomic(path, data)
        return path.name
    digest, place = hashlib.sha256(data).hexdigest(), path
    for number in range(1, _MANY):
        if place.is_file() and file_hash(place) == digest:
            return place.name
        try:
            write_atomic(place, data, overwrite=False)
            return place.name
        except Taken:
            place = path.with_name(f"{path.stem} ({number}){path.suffix}")
    raise BadRequest(f"There are too many files named like {path.name!r}; rename the picture.")


async def upload_image(request: web.Request) -> web.Response:
    """Store a picture; its name changes when another picture has it, unless `overwrite` is set."""
    image, form = await _form(request)
    path, below, kind = _target(context(request), image.filename, form)
    data = await asyncio.to_thread(image.file.read)
    await asyncio.to_thread(open_picture, data, image.filename)
    overwrite = _text(form, "overwrite").lower() in ("true", "1")
    name = await asyncio.to_thread(_store, path, data, overwrite)
    return reply({"name": name, "subfolder": below, "type": kind})


def _with_mask(original: Path, mask: bytes, mask_name: str) -> bytes:
    """PNG of the original's colours with the mask picture's alpha, and the original's text chunks."""
    picture, alpha = open_picture(original), open_picture(mask, mask_name).convert("RGBA").getchannel("A")
    if alpha.size != picture.size:
        raise BadRequest(
            f"The mask has {alpha.size[0]}x{alpha.size[1]} pixels, the picture {original.name} has "
            f"{picture.width}x{picture.height}; they must be of one size."
        )
    info = PngInfo()
    for key, value in getattr(picture, "text", {}).items():
        info.add_text(key, value)
    masked = eight_bit(picture).convert("RGBA")
    masked.putalpha(alpha)
    buffer = io.BytesIO()
    masked.save(buffer, "PNG", compress_level=4, pnginfo=info)
    return buffer.getvalue()


def _original(here: Context, form: Mapping[str, Any]) -> Path:
    """The picture that `original_ref` names."""
    reference = parse_json(_text(form, "original_ref"))
    if not isinstance(reference, dict):
        raise BadRequest("'original_ref' must be an object with filename, subfolder and type.")
    folder = here.folders.directory(str(reference.get("type") or "output"))
    path = contained(folder, reference.get("subfolder") or "", reference.get("filename") or "")
    if not path.is_file():
        raise web.HTTPNotFound(text=f"The masked picture {reference.get('filename')!r} does not exist any more.")
    return path


async def upload_mask(request: web.Request) -> web.Response:
    """Store a copy of the picture in `original_ref` whose alpha channel is the uploaded mask's."""
    image, form = await _form(request)
    here = context(request)
    path, below, kind = _target(here, image.filename, form)
    original, mask = _original(here, form), await asyncio.to_thread(image.file.read)
    data = await asyncio.to_thread(_with_mask, original, mask, image.filename)
    overwrite = _text(form, "overwrite").lower() in ("true", "1")
    name = await asyncio.to_thread(_store, path.with_suffix(".png"), data, overwrite)
    return reply({"name": name, "subfolder": below, "type": kind})


API = [web.post("/upload/image", upload_image), web.post("/upload/mask", upload_mask)]
