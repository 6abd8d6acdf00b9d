"""The routes of the host, one module per theme.

Each module has a table `API`, whose routes are served bare and below /api as ComfyUI does, or a table `PLAIN` for
those that have no /api form, or both.
"""

from __future__ import annotations

from aiohttp import web

from . import canvas, history, models, prompt, system, templates, uploads, user, view

_MODULES = (prompt, history, view, uploads, user, models, system, templates, canvas)


def route_table() -> list[web.RouteDef]:
    """All routes; the canvas's own files come last, because their pattern takes any path."""
    table: list[web.RouteDef] = []
    for module in _MODULES:
        for route in getattr(module, "API", ()):
            table.append(route)
            table.append(web.RouteDef(route.method, f"/api{route.path}", route.handler, route.kwargs))
        table += getattr(module, "PLAIN", ())
    return table
