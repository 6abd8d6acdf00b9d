"""Loading what is added to a model: ControlNets, IP-Adapters, Redux and the image encoders those see pictures with.

The same steps as for a model: names to native ones, sizes from shapes, everything checked before data is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import IPAdapter, Redux
from ..errors import FluxError
from ..sidenets import ControlNet
from ..vision import ImageEncoder, LateEncoder
from . import addition_shapes as sizes
from . import build, shapes
from .addition_names import CONTROLNET, IMAGE_ENCODER, IP_ADAPTER, REDUX, addition_in
from .contents import Component
from .devices import choose_device, choose_dtype
from .encoder_search import PUBLISHED, find_encoder, processor_for
from .files import open_tensors
from .hub import Progress, fetch_model, split_source
from .report import PartReport, Report, listed
from .sources import files_and_config, folder_name, what_it_is

log = logging.getLogger("fluxcanvas")

# Where a diffusers pipeline's folder has each; feature_extractor says how an image encoder's pictures are prepared.
SUBFOLDERS = {CONTROLNET: "controlnet", REDUX: "image_embedder", IMAGE_ENCODER: "image_encoder"}
FETCHED = (*SUBFOLDERS.values(), "feature_extractor")
MAKERS: Mapping[str, Callable[[Component], nn.Module]] = {
    CONTROLNET: sizes.controlnet,
    IP_ADAPTER: sizes.ip_adapter,
    REDUX: sizes.redux,
    IMAGE_ENCODER: sizes.image_encoder,
}


@dataclass(frozen=True)
class Found:
    """An addition's tensors, headers read and no data yet; its folder, and a short name."""

    component: Component
    folder: Path
    name: str


@dataclass(frozen=True)
class Place:
    """Where modules go, and who is told how far they are."""

    device: torch.device
    dtype: torch.dtype | str | None
    progress: Progress | None

    def fill(self, component: Component, make: Callable[[Component], nn.Module]) -> tuple[nn.Module, PartReport]:
        """Check everything by name and shape, then read. Names that nobody knows are warned of."""
        module = build.skeleton(component, make)
        fit = build.compare(component, module)
        build.refuse_unfit(component, fit)
        part = build.describe(component, fit)
        if part.unused:
            log.warning("%s has tensors that no %s uses: %s", shapes.where(component), part.name, listed(part.unused))
        dtype = choose_dtype(self.dtype, self.device, part.parameters)
        return build.fill(component, module, self.device, dtype, self._tick(part.name)), part

    def _tick(self, name: str) -> build.Tick | None:
        return None if self.progress is None else lambda part: self.progress(f"loading the {name}", part)


def load_controlnet(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> ControlNet:
    """Load a ControlNet of InstantX, Shakker, XLabs or MistoLine from a .safetensors file, a folder or a repository.

    Whatever is no ControlNet for FLUX.1 is a `FluxError` that says what it is, and what loads it.
    """
    found = open_addition(source, (CONTROLNET,), progress)
    place = Place(choose_device(device), dtype, progress)
    module, part = place.fill(found.component, sizes.controlnet)
    return ControlNet(module, found.name, Report(str(source), (part,)))


def load_adapter(
    source: str | Path,
    *,
    encoder: str | Path | ImageEncoder | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    search: Sequence[Path] = (),
    progress: Progress | None = None,
) -> IPAdapter | Redux:
    """Load an IP-Adapter of XLabs (v1, v2) or FLUX.1 Redux, with the image encoder that it sees pictures with.

    The encoder is the one named (a file, a folder, a repository or one already loaded), else one beside the adapter
    or in the model folders of `search` that fits it, else the published one, which is downloaded when the first picture
    is shown to it.
    """
    found = open_addition(source, (IP_ADAPTER, REDUX), progress)
    place = Place(choose_device(device), dtype, progress)
    module, part = place.fill(found.component, MAKERS[found.component.kind])
    clip = found.component.kind == IP_ADAPTER
    width = module.params.embed_dim if clip else module.redux_up.in_features
    eyes = _encoder(encoder, found, "CLIP" if clip else "SigLIP", width, search, place)
    parts = (part, *(eyes.report.parts if eyes and eyes.report else ()))
    report = Report(str(source), parts, notes=(f"image encoder: {eyes.name}",) if eyes else ())
    return (IPAdapter if clip else Redux)(module, eyes, found.name, report)


def load_image_encoder(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Progress | None = None,
) -> ImageEncoder:
    """Load CLIP's or SigLIP's vision model: a file (alone or with its text half), a folder or a repository."""
    return _open_encoder(source, Place(choose_device(device), dtype, progress))


def open_addition(source: str | Path, kinds: tuple[str, ...], progress: Progress | None = None) -> Found:
    """Find an addition of one of these kinds behind a file, a folder or a repository, which is downloaded."""
    text, wanted = str(source).strip(), " or ".join(kinds)
    path = Path(text).expanduser()
    if not text or "\0" in text:
        raise FluxError(f"no {wanted} is named; give a .safetensors file, a folder or a repository (owner/name)")
    name = ""
    if not path.exists():
        named = None if isinstance(source, Path) else split_source(text)
        if named is None:
            raise FluxError(f"there is no file or folder {text}, and it is no repository (owner/name); check the path")
        path, name = fetch_model(*named, progress, FETCHED), named[0].split("/")[1]
    part = _subfolder(path, kinds)
    files, config = files_and_config(part)
    found = addition_in(kinds, *_named_tensors(files, config))
    if not isinstance(found, Component):
        raise FluxError(f"{text} is no {wanted}: {what_it_is(found)}{_remedy(found.components)}")
    return Found(found, path if path.is_dir() else path.parent, name or _short_name(path))


def _named_tensors(files: Sequence[Path], config: Mapping[str, Any]) -> tuple:
    tensors, metadata = open_tensors(files)
    return tensors, tuple(map(str, files)), config, metadata


def _subfolder(path: Path, kinds: tuple[str, ...]) -> Path:
    """In a pipeline's folder, the component's; else the path itself."""
    inside = (path / SUBFOLDERS[kind] for kind in kinds if kind in SUBFOLDERS)
    return next((folder for folder in inside if path.is_dir() and folder.is_dir()), path)


def _remedy(components: Mapping[str, Component]) -> str:
    return "; load it with LoadFlux (load_flux)" if "transformer" in components else ""


def _short_name(path: Path) -> str:
    """A file's own name, or its folder's where all files are called alike."""
    alike = path.is_dir() or path.stem.startswith(("diffusion_pytorch_model", "model"))
    return path.stem if not alike else folder_name(path if path.is_dir() else path.parent)


def _encoder(
    named: str | Path | ImageEncoder | None, found: Found, family: str, width: int, search: Sequence[Path], place: Place
) -> ImageEncoder | LateEncoder | None:
    """The image encoder of an adapter, checked to fit it; None where nothing fits and none is published."""
    if named is not None:
        own = named if isinstance(named, ImageEncoder) else _open_encoder(named, place)
        if (own.family, own.width) != (family, width):
            raise FluxError(
                f"{found.name} sees pictures with a {family} image encoder of width {width}, and {own.name} is "
                f"{own.family} of width {own.width}; name the encoder that belongs to the adapter"
            )
        return own
    local = find_encoder(family, width, found.folder, search)
    if local is not None:
        file = Path(local.files[0])
        folder = found.folder if file.is_relative_to(found.folder) else file.parent
        return _fill_encoder(Found(local, folder, _short_name(file)), place)
    repo = PUBLISHED.get((family, width))
    if repo is not None:
        return LateEncoder(repo, lambda: _open_encoder(repo, place))
    log.warning("%s: no %s image encoder of width %d is here; name one to show it pictures", found.name, family, width)
    return None


def _open_encoder(source: str | Path, place: Place) -> ImageEncoder:
    return _fill_encoder(open_addition(source, (IMAGE_ENCODER,), place.progress), place)


def _fill_encoder(found: Found, place: Place) -> ImageEncoder:
    module, part = place.fill(found.component, sizes.image_encoder)
    processor = processor_for(found.component, module.config.image_size, found.folder)
    return ImageEncoder(module, processor, found.name, Report(found.name, (part,)))
