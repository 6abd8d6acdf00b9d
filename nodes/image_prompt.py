"""Pictures as prompts: FLUX.1 Redux and the IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..flux_runtime.errors import FluxError
from .checks import forward, numbers
from .edges import FLUX_ADAPTER, FLUX_CONDITIONING, IMAGE, MASK
from .host import current
from .latent import rgb
from .masks import region_of
from .model_files import AUTO, DTYPE_HELP, DTYPES, dtype_of, files, find, locate, make_room, state, tell_report, telling
from .schema import Output, node
from .widgets import Choice, Range, Text

FOLDERS = ("style_models", "ipadapter", "xlabs_ipadapters")
ENCODERS = "clip_vision"
PUBLISHED = (
    "black-forest-labs/FLUX.1-Redux-dev",
    "XLabs-AI/flux-ip-adapter-v2",
    "XLabs-AI/flux-ip-adapter",
)
BLACK_SIDE = 224  # of the black picture: the image encoder brings every one to its own size


def _state(source: str, image_encoder: str, **_: object) -> str:
    """The encoder that "auto" finds depends on all that lies in its folders."""
    host = current()
    located = locate(host, source, FOLDERS, PUBLISHED)
    chosen = find(host, image_encoder, (ENCODERS,))
    paths = [one for one in (located, chosen) if isinstance(one, Path)]
    return f"{located}|{state([*paths, *([] if chosen else _encoder_folders())])}"


def _encoder_folders() -> list[Path]:
    return [folder for folder in current().folders(ENCODERS) if folder.is_dir()]


@node("Load Adapter", category="loaders", aliases=("redux", "ip-adapter", "style model"), fingerprint=_state)
def load_adapter(
    source: Annotated[
        str,
        Choice(files(*FOLDERS, more=PUBLISHED)),
        "A file from the model folders style_models or ipadapter, or a published one by its name, downloaded once.",
    ],
    image_encoder: Annotated[
        str,
        Choice(lambda: [AUTO, *current().files(ENCODERS)]),
        "The model that looks at the pictures: SigLIP for Redux, CLIP for IP-Adapter. auto: the one that fits.",
    ] = AUTO,
    dtype: Annotated[str, Choice(DTYPES), DTYPE_HELP] = AUTO,
) -> Annotated[FLUX_ADAPTER, Output("adapter"), "Redux, for Redux Prior; or an IP-Adapter, for IP-Adapter."]:
    """Loads what makes prompts of pictures: FLUX.1 Redux or an XLabs IP-Adapter, with its image encoder."""
    host = current()
    tell = telling(host)
    from ..flux_runtime.weights import load_adapter as load

    located = locate(host, source, FOLDERS, PUBLISHED)
    encoder = None if image_encoder == AUTO else host.resolve(ENCODERS, image_encoder)
    make_room(host, located)
    options = {"device": host.device(), "dtype": dtype_of(dtype), "search": _encoder_folders()}
    adapter = load(located, encoder=encoder, progress=tell, **options)
    tell_report(host, adapter.report)
    return adapter


@node("Redux Prior", category="image prompt", aliases=("redux", "style model", "variation", "image prompt"))
def redux_prior(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt, from Encode Prompt; it may be empty."],
    adapter: Annotated[FLUX_ADAPTER, "FLUX.1 Redux, from Load Adapter."],
    image: Annotated[IMAGE, "The picture to vary, or a batch of several."],
    image_strength: Annotated[
        float, Range(0.0, 10.0, 0.05), "How much attention the pictures get. Below 1 the words count for more."
    ] = 1.0,
    text_strength: Annotated[float, Range(0.0, 10.0, 0.05), "How much attention the words get."] = 1.0,
    combine: Annotated[
        str,
        Choice(("join", "average", "sum")),
        "Of several pictures: join shows all, average their mean, sum adds them and the words up as diffusers does.",
    ] = "join",
    downsample: Annotated[
        int,
        Range(1, 27),
        "Leave 1 of so many image tokens in each direction: 3 keeps 9x9 of 27x27, so the words count for more.",
    ] = 1,
    region: Annotated[MASK | None, "Where on the canvas the pictures count: white. Without it, everywhere."] = None,
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The words and the pictures together."]:
    """Adds pictures to the prompt: FLUX draws variations of them, with the words as far as they have a say."""
    from ..flux_runtime.redux import with_pictures

    _check_kind(adapter, "Redux", "FLUX.1 Redux")
    strengths = {"text_strength": text_strength, "image_strength": image_strength}
    place = None if region is None else region_of(region)
    options = {"combine": combine, "downsample": downsample, "region": place}
    return with_pictures(conditioning, adapter, rgb(image), **strengths, **options)


@node(
    "IP-Adapter",
    category="image prompt",
    name="IPAdapter",
    aliases=("ipadapter", "image prompt", "style", "xlabs"),
    validate=forward("the adapter takes part from start to end, so 0 to 1 is the whole run"),
)
def ip_adapter(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt, from Encode Prompt or another condition."],
    adapter: Annotated[FLUX_ADAPTER, "An IP-Adapter, from Load Adapter."],
    image: Annotated[IMAGE, "The picture to follow. A batch of several makes one prompt together."],
    scale: Annotated[
        float, Range(-5.0, 5.0, 0.05), "How strongly the picture is followed; below 0 moves away from it."
    ] = 0.7,
    start: Annotated[float, Range(0.0, 1.0, 0.01), "Where in the run the adapter begins to take part."] = 0.0,
    end: Annotated[float, Range(0.0, 1.0, 0.01), "Where in the run it stops."] = 1.0,
    block_scales: Annotated[
        str,
        Text(placeholder="1, 1, 0.5, ..."),
        "A number for each double block (dev has 19) that multiplies the scale there. Empty: the same in all.",
    ] = "",
    negative_image: Annotated[
        IMAGE | None, "What the negative prompt sees, with true CFG. Without it, a black picture."
    ] = None,
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The prompt with this picture; several may follow."]:
    """Lets the picture follow another one in style and content, by an XLabs IP-Adapter. Use several for several."""
    from ..flux_runtime.conditions import ImagePromptCondition

    _check_kind(adapter, "IPAdapter", "an IP-Adapter")
    pictures = rgb(image)
    black = pictures.new_zeros(1, BLACK_SIDE, BLACK_SIDE, 3)
    negative = adapter.embed(black if negative_image is None else rgb(negative_image))
    scales = tuple(scale * block for block in numbers(block_scales, "block_scales")) or scale
    condition = ImagePromptCondition(adapter, adapter.embed(pictures), negative, scales, start, end)
    return conditioning.plus(condition)


USERS = {"Redux": "Redux Prior", "IPAdapter": "IP-Adapter"}


def _check_kind(adapter: FLUX_ADAPTER, kind: str, wanted: str) -> None:
    """Compared by name, as edges are."""
    have = type(adapter).__name__
    if have != kind:
        raise FluxError(
            f"{USERS[kind]} needs {wanted}, and {adapter.name} is another kind of adapter: connect it to "
            f"{USERS[have]}, or choose {wanted} in Load Adapter"
        )
