"""Image encoders that nobody named: where they lie, which is published, and how their pictures are prepared."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import FluxError
from ..pretrained import without_torchvision
from . import addition_shapes as sizes
from .addition_names import IMAGE_ENCODER, addition_in
from .contents import Component
from .files import open_tensors, read_json
from .sources import files_and_config, weight_paths

log = logging.getLogger("fluxcanvas")

PUBLISHED = {
    ("CLIP", 768): "openai/clip-vit-large-patch14",
    ("SigLIP", 1152): "google/siglip-so400m-patch14-384",
}

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of OpenAI's CLIP
BICUBIC = 3  # as PIL numbers it


def find_encoder(family: str, width: int, folder: Path, search: Sequence[Path]) -> Component | None:
    """An image encoder of this family and width in an adapter's folder, or in model folders and all below them."""
    for component in _encoders_in([folder, folder / "image_encoder"], search):
        own = "CLIP" if sizes.is_clip(component) else "SigLIP"
        if (own, sizes.embedding_width(component)) == (family, width) and not component.unreadable:
            return component
    return None


def _encoders_in(beside: Sequence[Path], below: Sequence[Path]) -> Iterator[Component]:
    """Every image encoder in these folders; files that cannot be read are passed over: nobody named them."""
    for path in weight_paths(beside, below):
        try:
            files, config = files_and_config(path)
            tensors, metadata = open_tensors(files)
            found = addition_in((IMAGE_ENCODER,), tensors, tuple(map(str, files)), config, metadata)
        except FluxError as error:
            log.info("passed over: %s", error)
            continue
        if isinstance(found, Component):
            yield found


def processor_for(component: Component, side: int, folder: Path) -> Any:
    """How pictures are resized and normalised: as a preprocessor_config.json says, else as the published ones are."""
    told = _told(Path(component.files[0]).parent, folder)
    if sizes.is_clip(component):
        own = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        own |= {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": BICUBIC}
        return without_torchvision("CLIPImageProcessor")(**own | told)
    own = {
        "size": {"height": side, "width": side},
        "resample": BICUBIC,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return without_torchvision("SiglipImageProcessor")(**own | told)


_READ = ("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop", "do_resize", "do_normalize")


def _told(*folders: Path) -> dict[str, Any]:
    """What a preprocessor_config.json beside the weights, or in a pipeline's feature_extractor, says."""
    places = [f / name / "preprocessor_config.json" for f in folders for name in ("", "feature_extractor")]
    file = next((place for place in places if place.is_file()), None)
    config = read_json(file) if file else {}
    return {name: config[name] for name in _READ if config.get(name) is not None}
