"""Libraries that are not installed with the package unless its extra is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import FluxError


def need(module: str, extra: str, what: str) -> ModuleType:
    """The module, or a `FluxError` that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # of any kind: these libraries import others, which check what they find
        own = isinstance(error, ImportError) and (error.name or module).partition(".")[0] == module.partition(".")[0]
        if own:
            raise FluxError(f'{what} needs {module}: install it with pip install "fluxcanvas[{extra}]"') from error
        raise FluxError(f"{what} needs {module}, which does not import: {error}; reinstall it") from error
