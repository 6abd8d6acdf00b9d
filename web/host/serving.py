"""Replies that carry a file: the right type, never something that a browser would run."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

# What a browser shows without running it. Everything else (HTML, SVG, XML, scripts ...) is sent as a download.
_PASSIVE = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".avif": "image/avif",
    ".ico": "image/x-icon",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mov": "video/quicktime",
    ".mp3": "audio/mpeg",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".txt": "text/plain",
    ".json": "application/json",
    ".md": "text/markdown",
}
# What the canvas and the packs' own folders hold besides: they are code of ours or installed by the user.
_CODE = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".woff": "font/woff",
    ".woff2": "font/woff2",
    ".ttf": "font/ttf",
    ".map": "application/json",
    ".webmanifest": "application/manifest+json",
}


def disposition(kind: str, name: str) -> str:
    """A Content-Disposition header for any file name."""
    return f"{kind}; filename*=UTF-8''{quote(name, safe='')}"


def file_reply(path: Path, cache: str = "no-cache") -> web.FileResponse:
    """A user's file: shown when it is passive, else sent as a download."""
    kind = _PASSIVE.get(path.suffix.lower())
    headers = {
        "Content-Type": kind or "application/octet-stream",
        "Cache-Control": cache,
        "Content-Disposition": disposition("inline" if kind else "attachment", path.name),
        "Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'",
    }
    return web.FileResponse(path, headers=headers)


def code_reply(path: Path, cache: str = "no-cache") -> web.FileResponse:
    """A file of the canvas or of a pack's web folder, scripts included; HTML pages of packs are downloads."""
    kind = _CODE.get(path.suffix.lower()) or _PASSIVE.get(path.suffix.lower())
    if kind is None:
        guess = mimetypes.guess_type(path.name)[0] or ""
        kind = guess if guess.startswith(("image/", "audio/", "video/", "font/")) else "application/octet-stream"
    return web.FileResponse(path, headers={"Content-Type": kind, "Cache-Control": cache})
