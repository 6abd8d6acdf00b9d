"""Control images made from pictures, and the check of what was drawn."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from .edges import IMAGE
from .host import current
from .latent import rgb
from .model_files import files, locate, make_room
from .schema import Output, node
from .widgets import Choice, Flag, Range

if TYPE_CHECKING:
    from ..flux_runtime.preprocess.depth import DepthEstimator

DEPTH = "depth"
DEPTH_MODELS = (
    "LiheYoung/depth-anything-large-hf",
    "LiheYoung/depth-anything-small-hf",
    "depth-anything/Depth-Anything-V2-Large-hf",
    "depth-anything/Depth-Anything-V2-Small-hf",
)
INTEGRITY = "integrity"
JUDGES = ("mistral-community/pixtral-12b",)
CLASSIFIERS = ("Falconsai/nsfw_image_detection",)


def _thresholds(low: float | None, high: float | None) -> bool | str:
    """Judges the thresholds before the run; a linked value is None."""
    for name, value in (("low", low), ("high", high)):
        if value is not None and not 0 <= value <= 2000:
            return f"{name} is {value}; it must be from 0 to 2000"
    if low is None or high is None or low <= high:
        return True
    return f"low ({low:g}) must not be above high ({high:g}): edges begin at high and go on while they are above low"


@node("Canny Map", category="preprocess", aliases=("canny", "edges", "lines"), validate=_thresholds)
def canny_map(
    image: Annotated[IMAGE, "The picture to find edges in."],
    low: Annotated[int, Range(0, 2000), "An edge goes on while it is steeper than this."] = 50,
    high: Annotated[int, Range(0, 2000), "An edge begins where it is steeper than this. Lower finds more."] = 200,
) -> Annotated[IMAGE, Output("image"), "White edges on black, for Control Image or ControlNet."]:
    """Finds the edges in a picture, with OpenCV."""
    from ..flux_runtime.preprocess.canny import canny

    return canny(rgb(image), low, high)


@node("Depth Map", category="preprocess", aliases=("depth anything", "depth", "midas"))
def depth_map(
    image: Annotated[IMAGE, "The picture to find the depth of."],
    model: Annotated[
        str,
        Choice(files(DEPTH, more=DEPTH_MODELS)),
        "A folder from the model folder depth, or a published model, which is downloaded once.",
    ] = DEPTH_MODELS[0],
    method: Annotated[
        str,
        Choice(("plain", "prepared")),
        "plain: as in the FLUX.1 Depth examples. prepared: resized for the model, which finds more in large pictures.",
    ] = "plain",
    invert: Annotated[bool, Flag(), "Make what is far white."] = False,
) -> Annotated[IMAGE, Output("image"), "Near is white, for Control Image or ControlNet."]:
    """Finds out how far away everything in a picture is, with Depth Anything."""
    host = current()
    host.check_interrupt()
    host.text("finding the depth")
    located = locate(host, model, (DEPTH,), DEPTH_MODELS)
    return _estimator(str(located), str(host.device())).estimate(rgb(image), method, invert)


@lru_cache(maxsize=1)
def _estimator(source: str, device: str) -> DepthEstimator:
    """The last depth model stays: it is small, and the next picture will want it."""
    from ..flux_runtime.preprocess.depth import DepthEstimator

    return DepthEstimator.load(source, device)


@node("Integrity Check", category="preprocess", aliases=("safety", "content filter", "pixtral", "nsfw"))
def integrity_check(
    image: Annotated[IMAGE, "The pictures to check, from Decode."],
    model: Annotated[
        str,
        Choice(files(INTEGRITY, more=JUDGES)),
        "Pixtral, which recognises characters, brands and public figures: 25 GB, downloaded once; or a folder of it.",
    ] = JUDGES[0],
    classifier: Annotated[
        str, Choice(files(INTEGRITY, more=CLASSIFIERS)), "What recognises nudity; or a folder from models/integrity."
    ] = CLASSIFIERS[0],
) -> Annotated[IMAGE, Output("image"), "The same pictures, if nothing speaks against them."]:
    """Passes pictures on that show nobody's property and no nudity, as FLUX.1 Kontext asks for. Else the run stops."""
    from ..flux_runtime.integrity import IntegrityChecker

    host = current()
    pictures = rgb(image)
    sources = [locate(host, model, (INTEGRITY,), JUDGES), locate(host, classifier, (INTEGRITY,), CLASSIFIERS)]
    for source in sources:
        make_room(host, source)
    host.check_interrupt()
    host.text("checking the pictures")
    return IntegrityChecker.load(*sources, device=host.device()).pass_on(pictures)
