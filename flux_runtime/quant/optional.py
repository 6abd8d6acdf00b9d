"""Libraries that are not installed with the package unless its extra is asked for."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from ..errors import FluxError


def need(module: str, extra: str, what: str) -> ModuleType:
    """The module, or a `FluxError` that says what needs it and how to install it into the Python that runs."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # of any kind: these libraries import others, which check what they find
        own = isinstance(error, ImportError) and (error.name or module).partition(".")[0] == module.partition(".")[0]
        if own:
            install = f"{sys.executable} -m pip install {module.replace('.', '-')}"
            raise FluxError(f"{what} needs {module} (the extra fluxcanvas[{extra}]): {install}") from error
        raise FluxError(f"{what} needs {module}, which does not import: {error}; reinstall it") from error
