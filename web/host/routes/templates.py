"""Workflow templates, blueprints and translations that packs bring."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from ..context import Context, context
from ..files import contained
from ..packs import Pack
from ..replies import complaint, parse_json, reply
from ..serving import file_reply

log = logging.getLogger("fluxcanvas")
_TEMPLATE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")
_TEMPLATE_FILES = (".json", ".jpg", ".jpeg", ".png", ".webp", ".webm", ".mp4")


def _template_folder(pack: Pack) -> Path | None:
    folders = (pack.folder / name for name in _TEMPLATE_FOLDERS)
    return next((folder for folder in folders if folder.is_dir() and any(folder.glob("*.json"))), None)


def _templates(here: Context) -> dict[str, list[str]]:
    """Pack -> the names of its templates."""
    folders = {pack.name: _template_folder(pack) for pack in here.packs.packs if pack.has_folder}
    return {name: sorted(path.stem for path in folder.glob("*.json")) for name, folder in folders.items() if folder}


async def list_templates(request: web.Request) -> web.Response:
    """The templates of all packs."""
    return reply(await asyncio.to_thread(_templates, context(request)))


async def get_template(request: web.Request) -> web.StreamResponse:
    """A template's workflow or thumbnail."""
    name = request.match_info["name"]
    for pack in context(request).packs.packs:
        if pack.name == request.match_info["pack"] and pack.has_folder and (folder := _template_folder(pack)):
            path = contained(folder, name)
            if path.is_file() and path.suffix.lower() in _TEMPLATE_FILES:
                return file_reply(path)
    return complaint(f"There is no template {name[:200]!r}.", status=404)


def _json_file(path: Path) -> Any:
    """The content of a pack's JSON file; None, with a word in the log, when it is broken."""
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        log.warning("%s is left out: %s", path, error)
        return None


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _locale(folder: Path) -> dict[str, Any]:
    """A language's folder: main.json at the top, the other files under their names."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stem != "main", path.name)):
        content = _json_file(path)
        if isinstance(content, dict):
            _merge(found, content if path.stem == "main" else {path.stem: content})
    return found


def _translations(here: Context) -> dict[str, Any]:
    """Language -> translations, those of later packs over those of earlier ones."""
    found: dict[str, Any] = {}
    for pack in here.packs.packs:
        folder = pack.folder / "locales"
        for language in sorted(folder.iterdir()) if pack.has_folder and folder.is_dir() else ():
            if language.is_dir():
                _merge(found, {language.name: _locale(language)})
    return found


async def i18n(request: web.Request) -> web.Response:
    """The packs' translations of their nodes, settings and commands."""
    return reply(await asyncio.to_thread(_translations, context(request)))


def _blueprints(here: Context) -> Iterator[tuple[str, Pack, Path]]:
    """Every subgraph file of the packs, with an id that stays the same while pack and file keep their names."""
    for pack in here.packs.packs:
        for path in sorted((pack.folder / "subgraphs").glob("*.json")) if pack.has_folder else ():
            yield hashlib.sha256(f"{pack.name}/{path.name}".encode()).hexdigest(), pack, path


async def global_subgraphs(request: web.Request) -> web.Response:
    """The packs' subgraphs, without their content."""
    return reply(
        {
            key: {"source": "custom_node", "name": path.stem, "info": {"node_pack": f"custom_nodes.{pack.name}"}}
            for key, pack, path in _blueprints(context(request))
        }
    )


async def global_subgraph(request: web.Request) -> web.Response:
    """One subgraph with its content as JSON text in `data`."""
    for key, pack, path in _blueprints(context(request)):
        content = _json_file(path) if key == request.match_info["key"] else None
        if content is not None:
            return reply(
                {
                    "source": "custom_node",
                    "name": path.stem,
                    "data": json.dumps(content),
                    "info": {"node_pack": f"custom_nodes.{pack.name}"},
                }
            )
    return complaint("There is no such subgraph.", status=404)


async def empty_list(request: web.Request) -> web.Response:
    """The gallery's own templates, of which there are none: they need other nodes."""
    return reply([])


async def empty_object(request: web.Request) -> web.Response:
    """The logos of those templates."""
    return reply({})


API = [
    web.get("/workflow_templates", list_templates),
    web.get("/workflow_templates/{pack}/{name}", get_template),
    web.get("/i18n", i18n),
    web.get("/global_subgraphs", global_subgraphs),
    web.get("/global_subgraphs/{key}", global_subgraph),
]
PLAIN = [web.get("/templates/index.json", empty_list), web.get("/templates/index_logo.json", empty_object)]
