"""FLUX.1 on a node canvas.

This folder is three things: the Python package `fluxcanvas`, a pack for ComfyUI's `custom_nodes`, and the root of a
checkout. ComfyUI imports it under a name made from its path, so everything inside is imported relatively, and only
when it is asked for.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
WEB_DIRECTORY = "./web/js"
_FROM_NODES = ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]


def __getattr__(name: str) -> Any:
    if name not in _FROM_NODES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".nodes", __name__), name)
