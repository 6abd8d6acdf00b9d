"""Loads node packs: our own nodes and the folders in custom_nodes, by ComfyUI's rules."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from .core_nodes import DISPLAY_NAMES, core_nodes
from .folders import CHECKOUT, Folders
from .node_info import NodeDefinitionError, node_info

log = logging.getLogger("fluxcanvas")
OWN = "fluxcanvas"


@dataclass(frozen=True)
class Pack:
    """One loaded pack: the name in its URLs, its folder, and the folder of its browser scripts if it has one."""

    name: str
    folder: Path
    web: Path | None = None
    has_folder: bool = True  # a single .py file shares its folder with other packs: nothing there is its own


@dataclass
class Packs:
    """All nodes by id with their display names, the packs they came from, and why some did not load."""

    nodes: dict[str, type] = field(default_factory=dict)
    display_names: dict[str, str] = field(default_factory=dict)
    packs: list[Pack] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def web_folders(self) -> dict[str, Path]:
        """Pack name -> folder of its browser scripts, for /extensions/<name>/."""
        return {pack.name: pack.web for pack in self.packs if pack.web is not None}


def load_packs(folders: Folders) -> Packs:
    """Load the core nodes, our own and every custom pack; a pack that fails is reported in `failures` and the log."""
    packs = Packs()
    packs.nodes.update(core_nodes(folders))
    packs.display_names.update(DISPLAY_NAMES)
    _load_own(packs)
    fixed = frozenset(packs.nodes)
    for root in folders.custom_nodes:
        for path in _candidates(root):
            _load_custom(packs, path, fixed)
    return packs


def _load_own(packs: Packs) -> None:
    module = importlib.import_module("...nodes", __package__)
    for node_id, cls in module.NODE_CLASS_MAPPINGS.items():
        cls.RELATIVE_PYTHON_MODULE = f"custom_nodes.{OWN}"
        node_info(node_id, cls)  # a malformed node of our own is our fault: it stops the start, not the canvas
        packs.nodes[node_id] = cls
    packs.display_names.update(getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", {}))
    web = CHECKOUT / "web" / "js"
    packs.packs.append(Pack(OWN, CHECKOUT, web if web.is_dir() else None))


def _candidates(root: Path) -> list[Path]:
    """The packs in a custom_nodes folder: folders and .py files, but those switched off with `.disabled`."""
    if not root.is_dir():
        return []
    return sorted(
        path
        for path in root.iterdir()
        if (path.is_dir() or path.suffix == ".py")
        and not path.name.endswith(".disabled")
        and not path.name.startswith((".", "__pycache__"))
    )


def _load_custom(packs: Packs, path: Path, fixed: frozenset[str]) -> None:
    """Load one pack. Whatever it raises is reported: a broken pack never keeps the server from starting."""
    start = time.perf_counter()
    try:
        module = _import(path)
        _register(packs, module, path, fixed)
    except (Exception, SystemExit) as error:  # foreign code at import: it may raise anything, even sys.exit()
        packs.failures[path.name] = f"{type(error).__name__}: {error}"
        log.error("The node pack %s did not load: %s", path, packs.failures[path.name], exc_info=error)
        return
    log.info("Loaded the node pack %s in %.1f s", path.name, time.perf_counter() - start)


def _import(path: Path) -> ModuleType:
    """Import by file location. As in ComfyUI, the module is named by its path with '.' as '_x_'.

    (A single file as well: under its bare name a pack `json.py` would replace Python's own module.)
    """
    name = str(path).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, path if path.is_file() else path / "__init__.py")
    if spec is None or spec.loader is None or not Path(str(spec.origin)).is_file():
        raise ImportError(f"{path} has no __init__.py")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _register(packs: Packs, module: ModuleType, path: Path, fixed: frozenset[str]) -> None:
    mappings = getattr(module, "NODE_CLASS_MAPPINGS", None)
    folder = path if path.is_dir() else path.parent
    web = _web_folder(module, folder)
    if mappings is None and web is None:
        raise ImportError(_without_nodes(module))
    kept = _valid_nodes(packs, mappings or {}, path, fixed)
    packs.nodes.update(kept)
    names = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None) or {}
    packs.display_names.update({key: str(name) for key, name in names.items() if key in kept})
    packs.packs.append(Pack(path.stem if path.is_file() else path.name, folder, web, has_folder=path.is_dir()))


def _without_nodes(module: ModuleType) -> str:
    if hasattr(module, "comfy_entrypoint"):
        return "it defines its nodes through comfy_entrypoint (ComfyUI's V3 API), which only ComfyUI itself runs"
    return "it defines no NODE_CLASS_MAPPINGS"


def _web_folder(module: ModuleType, folder: Path) -> Path | None:
    """The folder named by WEB_DIRECTORY, if it lies within the pack."""
    declared = getattr(module, "WEB_DIRECTORY", None)
    if not isinstance(declared, str):
        return None
    web = (folder / declared).resolve()
    return web if web.is_dir() and web.is_relative_to(folder.resolve()) else None


def _valid_nodes(packs: Packs, mappings: Mapping[str, Any], path: Path, fixed: frozenset[str]) -> dict[str, type]:
    """The pack's well-formed nodes; core ids are not replaced, malformed classes are told and left out."""
    kept: dict[str, type] = {}
    for node_id, cls in mappings.items():
        if node_id in fixed:
            log.info("The node pack %s brings %s, which is there already; the present one is kept", path.name, node_id)
            continue
        try:
            cls.RELATIVE_PYTHON_MODULE = f"custom_nodes.{path.stem if path.is_file() else path.name}"
            node_info(node_id, cls)
        except Exception as error:  # INPUT_TYPES and odd metaclasses are foreign code
            kind = "" if isinstance(error, NodeDefinitionError) else f"{type(error).__name__}: "
            packs.failures[f"{path.name}/{node_id}"] = f"{kind}{error}"
            log.error("Node %s of the pack %s is left out: %s%s", node_id, path.name, kind, error)
            continue
        if node_id in packs.nodes:
            log.warning("Node %s of the pack %s replaces that of another pack", node_id, path.name)
        kept[str(node_id)] = cls
    return kept
