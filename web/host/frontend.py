"""The canvas itself: the files of the comfyui-frontend-package wheel, and the content policy of its page."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "comfyui_frontend_package"
# Names that the build made from the content: such a file never changes.
_HASHED = re.compile(r"-[\w-]{8}\.\w+$")


def static_folder() -> Path:
    """The folder with index.html; ModuleNotFoundError when the wheel is not installed."""
    import comfyui_frontend_package

    return Path(str(comfyui_frontend_package.__file__)).parent / "static"


def version() -> str:
    """The installed version of the canvas, such as 1.58.1."""
    return metadata.version(DISTRIBUTION)


def cache_control(path: Path) -> str:
    """How long a browser may keep a file of the canvas."""
    return "public, max-age=31536000, immutable" if _HASHED.search(path.name) else "no-cache"


def content_policy(host: str) -> str:
    """The page may load and connect to nothing but this server, and no other page may frame it.

    `host` is the checked Host header: not every browser counts WebSockets to the same host as 'self'. The scripts
    need inline code and eval (the frontend's build has both).
    """
    return (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
        f"font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' ws://{host} wss://{host} data: blob:; "
        "frame-src 'self' blob:; form-action 'self'; frame-ancestors 'none'; object-src 'none'; base-uri 'self'"
    )
