"""Where a model's parts come from: the demo, a folder in diffusers layout, a single file, or files named one by one."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import FluxError
from . import hub
from .contents import FOREIGN, KINDS, Component, Contents, sort_out
from .files import WEIGHT_ENDINGS, WEIGHT_NAMES, component_files, open_tensors, read_json

log = logging.getLogger("fluxcanvas")

DEMO = Path(__file__).resolve().parents[2] / "demo" / "weights"
FOLDERS = {"transformer": "transformer", "clip": "text_encoder", "t5": "text_encoder_2", "vae": "vae"}
LABELS = {"transformer": "transformer", "clip": "CLIP text encoder", "t5": "T5 text encoder", "vae": "VAE"}


@dataclass(frozen=True)
class Sources:
    """Parts found (headers read, no data yet), where tokenizers may lie, and what is known besides."""

    name: str
    components: Mapping[str, Component]
    folders: tuple[Path, ...] = ()
    scheduler: Mapping[str, Any] | None = None
    hint: str = ""  # a name that may tell variants of equal shape apart
    leftover: tuple[str, ...] = ()
    foreign: str = ""
    absent: tuple[str, ...] = field(default=())  # parts that a diffusers folder says it does not have

    @property
    def variant_hint(self) -> str:
        """What may tell variants of equal shape apart: the transformer's own header, else a name."""
        return self._told.get("variant") or self.hint

    @property
    def schedule(self) -> Mapping[str, Any] | None:
        """The scheduler's config: of its file, else of the transformer's own header."""
        return self.scheduler or self._told.get("scheduler")

    @property
    def _told(self) -> Mapping[str, Any]:
        transformer = self.components.get("transformer")
        return transformer.told if transformer else {}


def open_source(source: str | Path, progress: hub.Progress | None = None) -> Sources:
    """Find the parts behind `demo`, a folder, a file or a repository id; a repository is downloaded."""
    text = str(source).strip()
    if text == "demo":
        return replace(open_path(DEMO), name="demo", hint="demo")
    path = Path(text).expanduser()
    if not text or "\0" in text:
        raise FluxError(
            "no model is named; give 'demo', a folder, a .safetensors file or a Hugging Face repository (owner/name)"
        )
    if path.exists():
        return open_path(path)
    named = hub.split_source(text)
    if named is None or isinstance(source, Path):
        raise FluxError(
            f"there is no file or folder {text}, and it is no Hugging Face repository (owner/name); check the path"
        )
    repo, file = named
    return replace(open_path(hub.fetch_model(repo, file, progress)), name=text, hint=f"{repo} {file}")


def open_path(path: Path) -> Sources:
    """The parts in a local folder or file."""
    return open_folder(path) if path.is_dir() else open_file(path)


def open_file(path: Path) -> Sources:
    contents = read_contents(*files_and_config(path))
    return Sources(str(path), contents.components, (path.parent,), None, path.stem, contents.leftover, contents.foreign)


def open_folder(folder: Path) -> Sources:
    """A model in diffusers layout, or the folder of a single component."""
    inside = {kind: folder / name for kind, name in FOLDERS.items() if (folder / name).is_dir()}
    if not inside:
        return _lone_component(folder)
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    pipeline = str(index.get("_class_name", "Flux"))
    if not pipeline.startswith("Flux") or pipeline.startswith("Flux2"):
        return Sources(str(folder), {}, foreign=pipeline)
    absent = tuple(kind for kind, name in FOLDERS.items() if index.get(name) == [None, None])
    components = {kind: open_component(path, kind) for kind, path in inside.items() if kind not in absent}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return Sources(
        str(folder),
        components,
        (folder,),
        read_json(scheduler) if scheduler.is_file() else None,
        folder_name(folder),
        absent=absent,
    )


def _lone_component(folder: Path) -> Sources:
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        contents = read_contents(*files_and_config(folder))
        return Sources(
            str(folder),
            contents.components,
            (folder, folder.parent),
            None,
            folder.name,
            contents.leftover,
            contents.foreign,
        )
    raise FluxError(
        f"{folder} is no model: it has neither the folders of a diffusers model (transformer, vae, ...) "
        "nor a .safetensors file; name another folder or a file"
    )


def folder_name(folder: Path) -> str:
    """The telling part of a path: the download cache hides the repository's name two folders up."""
    return folder.parents[1].name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else folder.name


def open_component(path: Path, kind: str) -> Component:
    """One part from its own file or folder (or from a file that has it among others)."""
    path = Path(path).expanduser()
    if not path.exists():
        raise FluxError(f"the {LABELS[kind]} {path} does not exist; check the path")
    if path.is_dir() and (path / FOLDERS[kind]).is_dir():
        path = path / FOLDERS[kind]
    contents = read_contents(*files_and_config(path))
    if kind not in contents.components:
        raise FluxError(f"{path} holds no {LABELS[kind]}: {what_it_is(contents)}")
    component = contents.components[kind]
    alone = len(contents.components) == 1
    return replace(component, unknown=(*component.unknown, *contents.leftover)) if alone else component


def what_it_is(contents: Contents | Sources) -> str:
    """A clause that says what was found instead."""
    if contents.foreign:
        what = next((use for _, kind, use in FOREIGN if kind == contents.foreign), "another family of models")
        return f"it is {'an' if contents.foreign[0] in 'AEIOaeio' else 'a'} {contents.foreign}: {what}"
    if contents.components:
        return "it holds " + " and ".join(f"a {LABELS[kind]}" for kind in contents.components)
    names = ", ".join(contents.leftover[:3])
    return f"its tensors ({names}, ...) are of no kind known here" if names else "it holds no tensors"


def read_contents(files: Sequence[Path], config: Mapping[str, Any]) -> Contents:
    """Sort the tensors of one component's files, or of one file with several parts, into parts."""
    tensors, metadata = open_tensors(files)
    return sort_out(tensors, tuple(map(str, files)), config, metadata)


def files_and_config(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The weight files of a component's folder, or the one file; and the config.json that belongs to them."""
    return (component_files(path), _config_of(path)) if path.is_dir() else ([path], _config_beside(path))


def _config_of(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _config_beside(path: Path) -> dict[str, Any]:
    """The config of a file that carries a component folder's standard name; other files may stand beside anything."""
    return _config_of(path.parent) if path.name.startswith(tuple(f"{name}." for name in WEIGHT_NAMES)) else {}


def complete(sources: Sources, wanted: Mapping[str, Any], search: Sequence[Path]) -> Sources:
    """Add the parts that a bare transformer lacks from model folders, choosing files whose sizes fit it.

    `wanted` gives for each kind a test of a component; plain weights are preferred to packed, those to unreadable ones.
    """
    lacking = [kind for kind in KINDS if kind not in sources.components and kind not in sources.absent]
    if not lacking:
        return sources
    found: dict[str, list[Component]] = {kind: [] for kind in lacking}
    for component in _components_in(sources.folders, search):
        if component.kind in found and wanted[component.kind](component):
            found[component.kind].append(component)
    chosen = {kind: min(list_, key=_readiness) for kind, list_ in found.items() if list_}
    still = [LABELS[kind] for kind in lacking if kind not in chosen]
    if still:
        have = " and ".join(LABELS[kind] for kind in sources.components)
        raise FluxError(
            f"{sources.name} holds only the {have}; missing: {', '.join(still)} (looked in: "
            f"{', '.join(map(str, search)) or 'no model folders'}). Put them into the model folders, or name each file "
            "with LoadFluxParts (load_parts)"
        )
    return replace(sources, components={**sources.components, **chosen})


def _readiness(component: Component) -> int:
    """Lower is better; equal ones keep the order of their folders and names."""
    packed = any(t.packed or t.dtype.startswith("F8") for t in component.tensors.values())
    return 2 if component.unreadable else 1 if packed else 0


def _components_in(beside: Sequence[Path], below: Sequence[Path]) -> Iterator[Component]:
    """Every part of a model in some folders. Files that cannot be read are passed over: nobody named them."""
    for path in weight_paths(beside, below):
        try:
            contents = read_contents(*files_and_config(path))
        except FluxError as error:
            log.info("passed over: %s", error)
            continue
        for component in contents.components.values():
            if component.fault:
                log.info("passed over: %s", component.fault)
            else:
                yield component


def weight_paths(beside: Sequence[Path], below: Sequence[Path]) -> list[Path]:
    """Weight files, and folders of sharded ones, in some folders, and in others with all that is below them."""
    found = [path for folder in beside for path in folder.glob("*") if _may_be_weights(path)]
    found += [path for folder in below for path in sorted(folder.rglob("*")) if _may_be_weights(path)]
    whole = [path for path in found if not re.search(r"-\d+-of-\d+", path.name)]  # shards are found by their index
    return list(dict.fromkeys(path.parent if path.suffix == ".json" else path for path in whole))


def _may_be_weights(path: Path) -> bool:
    """By its name: a file of weights, or the index of a sharded one."""
    return path.name.endswith((*WEIGHT_ENDINGS, ".safetensors.index.json"))
