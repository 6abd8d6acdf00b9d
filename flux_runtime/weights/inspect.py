"""What a checkpoint is, from headers alone: no tensor is read, and a repository is not downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FluxError
from ..variants import recognise
from . import build, hub, shapes
from .contents import LORA, Component, Contents, sort_out
from .files import LazyTensor, open_tensors, read_json
from .report import PartReport, Report, listed
from .sources import DEMO, FOLDERS, LABELS, Sources, open_path, what_it_is


def inspect(source: str | Path) -> Report:
    """Report on `demo`, a file, a folder or a repository id; kinds that are not loaded are named for what they are."""
    text = str(source).strip()
    path = DEMO if text == "demo" else Path(text).expanduser()
    if text and "\0" not in text and path.exists():
        sources = replace(open_path(path), name=text)
        return _other(path, sources) if path.is_file() and not sources.components else _report(sources)
    named = hub.split_source(text)
    if named is None:
        raise FluxError(
            f"there is no file or folder {text!r}, and it is no Hugging Face repository (owner/name); check the path"
        )
    return _report(_remote(*named))


def _other(path: Path, sources: Sources) -> Report:
    """A sound file that is no part of a model: a LoRA, a ControlNet, or of no kind known here."""
    tensors, _ = open_tensors([path])
    component = Component(sources.foreign or "unknown", "", tensors, (str(path),))
    note = what_it_is(sources)
    part = build.describe(component, build.Fit(tuple(tensors), (), (), ()), note)
    return Report(sources.name, (part,), notes=_about_lora(path) if sources.foreign == LORA else ())


def _about_lora(path: Path) -> tuple[str, ...]:
    """What a LoRA changes, or why it cannot."""
    from ..lora.formats import read_lora

    try:
        return tuple(read_lora(path).summary().splitlines())
    except FluxError as error:
        return (str(error),)


def _report(sources: Sources) -> Report:
    if not sources.components:
        return Report(sources.name, (), notes=(what_it_is(sources),))
    parts = tuple(_part(component) for component in sources.components.values())
    lacking = [LABELS[kind] for kind in FOLDERS if kind not in sources.components]
    notes = [f"not in it: {', '.join(lacking)}"] if lacking else []
    notes += [f"unused: {listed(sources.leftover)}"] if sources.leftover else []
    return Report(sources.name, parts, _variant(sources), tuple(notes))


def _part(component: Component) -> PartReport:
    """A component that cannot be loaded is described too: why is the note."""
    plain = build.Fit(tuple(component.tensors), (), component.unknown, ())
    if component.unreadable:
        return build.describe(component, plain, f"stored as {component.unreadable}, which is not read here")
    try:
        fit = build.compare(component, build.skeleton(component))
    except FluxError as error:
        return build.describe(component, plain, str(error))
    packed = Counter(stored.packing.title for t in component.tensors.values() for stored in t.sources if stored.packing)
    note = ", ".join(f"{count} tensors as {title}" for title, count in packed.most_common())
    return build.describe(component, fit, f"wrong shapes: {listed(fit.misshapen)}" if fit.misshapen else note)


def _variant(sources: Sources) -> str:
    component = sources.components.get("transformer")
    if component is None:
        return ""
    try:
        return recognise(shapes.transformer_params(component), sources.variant_hint).name
    except FluxError:
        return ""


def _remote(repo: str, file: str) -> Sources:
    listing = hub.list_repo(repo, file)
    if listing.single:
        tensors, metadata = hub.remote_tensors(repo, listing.single)
        contents = sort_out(tensors, (f"{repo}/{listing.single}",), {}, metadata)
        return Sources(
            repo, contents.components, hint=f"{repo} {file}", leftover=contents.leftover, foreign=contents.foreign
        )
    top = [name for name in listing.weights if "/" not in name]
    if top:
        contents = _remote_component(repo, "", top, listing)
        return Sources(repo, contents.components, hint=repo, leftover=contents.leftover, foreign=contents.foreign)
    components: dict[str, Component] = {}
    for kind, folder in FOLDERS.items():
        names = [name for name in listing.weights if name.startswith(folder + "/")]
        if names:
            contents = _remote_component(repo, folder + "/", names, listing)
            if kind in contents.components:
                components[kind] = contents.components[kind]
    return Sources(repo, components, hint=repo)


def _remote_component(repo: str, folder: str, names: list[str], listing: hub.Listing) -> Contents:
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for name in names:
        own, told = hub.remote_tensors(repo, name)
        tensors.update(own)
        metadata.update(told)
    config: Mapping[str, Any] = {}
    if f"{folder}config.json" in listing.sizes:
        config = read_json(hub.remote_json(repo, f"{folder}config.json"))
    return sort_out(tensors, tuple(f"{repo}/{name}" for name in names), config, metadata)
