"""Checkpoints become a model, text encoders and a VAE."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..flux_runtime.errors import FluxError
from ..flux_runtime.variants import VARIANTS
from .edges import FLUX_MODEL, FLUX_TEXT, FLUX_VAE
from .host import Host, current
from .model_files import AUTO, DTYPE_HELP, DTYPES, dtype_of, files, find, state, tell_report, telling
from .quant import NONE, SCHEME_HELP, SCHEMES
from .schema import Output, node
from .widgets import Choice

if TYPE_CHECKING:
    from ..flux_runtime.flux import Flux
    from ..flux_runtime.weights.devices import Devices

DEMO = "demo"
SOURCES = ("diffusers", "diffusion_models", "checkpoints")  # in this order when two folders hold one name
PARTNERS = ("text_encoders", "vae", "tokenizers", "diffusers")  # where a bare transformer finds the rest
PART_FOLDERS = {
    "transformer": ("diffusion_models", "checkpoints"),
    "clip": ("text_encoders",),
    "t5": ("text_encoders",),
    "vae": ("vae",),
}

Loaded = tuple[
    Annotated[FLUX_MODEL, Output("model"), "The transformer, for Sample."],
    Annotated[FLUX_TEXT, Output("text"), "The CLIP and T5 text encoders, for Encode Prompt."],
    Annotated[FLUX_VAE, Output("vae"), "The VAE, for Decode and Encode Image."],
]

BALANCED, CPU = "balanced", "cpu"


def _devices() -> list[str]:
    """The CPU and the CUDA devices; a program that has not imported torch is not made to for a list of names."""
    torch = sys.modules.get("torch")
    return [CPU, *(f"cuda:{index}" for index in range(torch.cuda.device_count() if torch else 0))]


Quantized = Annotated[
    str,
    Choice(SCHEMES, optional=True),
    f"Store the transformer in fewer bits as it is loaded. none: as its file does. {SCHEME_HELP}",
]
QuantizedT5 = Annotated[
    str, Choice(SCHEMES, optional=True), "The same for T5, the larger text encoder. none: as its file does."
]
Device = Annotated[
    str,
    Choice(lambda: [AUTO, BALANCED, *_devices()], optional=True),
    "Where the model lies and draws. auto: the host's device. balanced: all parts spread over the GPUs there are.",
]
TextDevice = Annotated[
    str,
    Choice(lambda: [AUTO, *_devices()], optional=True),
    "Where the text encoders lie and read. auto: with the model. cpu saves 5 to 10 GB of a GPU and reads more slowly.",
]


def _sources() -> list[str]:
    host = current()
    found = [name for category in SOURCES for name in host.files(category)]
    return list(dict.fromkeys([DEMO, *found, *(variant.repo_id for variant in VARIANTS.values())]))


def _tokenizers() -> list[str]:
    """Folders that hold both tokenizers: sub-folders of the tokenizers folders, and whole models."""
    pairs = (name.rpartition("/")[0] for name in current().files("tokenizers"))
    return list(dict.fromkeys([AUTO, *filter(None, pairs), *current().files("diffusers")]))


def _tokenizer_folder(host: Host, name: str) -> Path | None:
    if name == AUTO:
        return None
    inside = next((one for one in host.files("tokenizers") if one.rpartition("/")[0] == name), None)
    return host.resolve("tokenizers", inside).parent if inside else host.resolve("diffusers", name)


def _locate(host: Host, source: str) -> str | Path:
    """What `load_flux` takes: "demo", a path, or a repo id of the table. A folder of that name comes first."""
    path = None if source == DEMO else find(host, source, SOURCES)
    if path or source == DEMO or any(source == variant.repo_id for variant in VARIANTS.values()):
        return path or source
    return host.resolve(SOURCES[1], source)  # raises, naming the folders searched


def _source_state(source: str, **_: object) -> str:
    """A bare file depends on the folders where its partners lie too."""
    host = current()
    located = _locate(host, source)
    if isinstance(located, str):
        return located
    return state([located, *([] if located.is_dir() else _partner_folders(host))])


def _partner_folders(host: Host) -> list[Path]:
    return [folder for category in PARTNERS for folder in host.folders(category) if folder.is_dir()]


def _making_room(host: Host, places: Devices) -> Callable[[Mapping[str, int]], None]:
    """A `make_room` for the loader: the host frees memory for those parts that go to a device of its own kind."""
    own = host.device().type

    def ask(sizes: Mapping[str, int]) -> None:
        here = [part for part in sizes if places == BALANCED or str(places[part]).partition(":")[0] == own]
        if here:
            host.free_memory(sum(sizes[part] for part in here))

    return ask


def _places(host: Host, device: str, text_device: str) -> Devices:
    """Which device each part goes to."""
    if device == BALANCED:
        if text_device != AUTO:
            raise FluxError("balanced places the text encoders too: set text_device to auto, or choose one device")
        return BALANCED
    main = host.device() if device == AUTO else device
    text = main if text_device == AUTO else text_device
    return {"transformer": main, "clip": text, "t5": text, "vae": main}


def _packing(transformer: str, t5: str) -> dict[str, str]:
    """Which parts are quantised, and how."""
    return {part: scheme for part, scheme in (("transformer", transformer), ("t5", t5)) if scheme != NONE}


def _given(host: Host, flux: Flux) -> tuple[FLUX_MODEL, FLUX_TEXT, FLUX_VAE]:
    """The three outputs, and a word on them."""
    tell_report(host, flux.report)
    return flux.model, flux.text, flux.vae


@node("Load FLUX", category="loaders", aliases=("checkpoint", "model", "unet", "download"), fingerprint=_source_state)
def load_flux(
    source: Annotated[
        str,
        Choice(_sources),
        "demo: the tiny storybook model that comes along. Or a file or folder from the model folders. Or a published "
        "model by its name, which is downloaded once (24 GB or more).",
    ] = DEMO,
    dtype: Annotated[str, Choice(DTYPES), DTYPE_HELP] = AUTO,
    quantize: Quantized = NONE,
    quantize_t5: QuantizedT5 = NONE,
    device: Device = AUTO,
    text_device: TextDevice = AUTO,
) -> Loaded:
    """Loads a FLUX.1 model: transformer, text encoders, VAE. A bare transformer finds the rest in the model folders."""
    host = current()
    tell = telling(host)
    from ..flux_runtime.weights import load_flux as load

    places = _places(host, device, text_device)
    flux = load(
        _locate(host, source), device=places, dtype=dtype_of(dtype), quantize=_packing(quantize, quantize_t5),
        search=_partner_folders(host), progress=tell, make_room=_making_room(host, places),
    )  # fmt: skip
    return _given(host, flux)


def _parts_state(transformer: str, clip: str, t5: str, vae: str, tokenizers: str, **_: object) -> str:
    host = current()
    chosen = _parts(host, transformer, clip, t5, vae)
    return state([*chosen.values(), *filter(None, [_tokenizer_folder(host, tokenizers)])])


def _parts(host: Host, transformer: str, clip: str, t5: str, vae: str) -> dict[str, Path]:
    """The path of each part, looked for in its own folders; raises with the folders searched."""
    names = {"transformer": transformer, "clip": clip, "t5": t5, "vae": vae}
    return {
        part: find(host, name, PART_FOLDERS[part]) or host.resolve(PART_FOLDERS[part][0], name)
        for part, name in names.items()
    }


@node("Load FLUX Parts", category="loaders", aliases=("dual clip", "unet", "load vae"), fingerprint=_parts_state)
def load_flux_parts(
    transformer: Annotated[str, Choice(files(*PART_FOLDERS["transformer"])), "The transformer (flux1-*.safetensors)."],
    clip: Annotated[str, Choice(files(*PART_FOLDERS["clip"])), "The CLIP-L text encoder (clip_l.safetensors)."],
    t5: Annotated[str, Choice(files(*PART_FOLDERS["t5"])), "The T5-XXL text encoder (t5xxl_*.safetensors)."],
    vae: Annotated[str, Choice(files(*PART_FOLDERS["vae"])), "The FLUX VAE (ae.safetensors)."],
    variant: Annotated[
        str,
        Choice((AUTO, *VARIANTS)),
        "Which FLUX.1 this is: it sets recommended steps, guidance and schedule. auto: by weights, header and name.",
    ] = AUTO,
    dtype: Annotated[str, Choice(DTYPES), DTYPE_HELP] = AUTO,
    tokenizers: Annotated[
        str,
        Choice(_tokenizers),
        "The folder with the CLIP and T5 tokenizers. auto: the first that fits, or the published ones.",
    ] = AUTO,
    quantize: Quantized = NONE,
    quantize_t5: QuantizedT5 = NONE,
    device: Device = AUTO,
    text_device: TextDevice = AUTO,
) -> Loaded:
    """Loads a FLUX.1 model from four files of their own, as they lie in ComfyUI's model folders."""
    host = current()
    tell = telling(host)
    from ..flux_runtime.weights import load_parts

    places = _places(host, device, text_device)
    flux = load_parts(
        **_parts(host, transformer, clip, t5, vae), tokenizers=_tokenizer_folder(host, tokenizers),
        variant=None if variant == AUTO else variant, device=places, dtype=dtype_of(dtype),
        quantize=_packing(quantize, quantize_t5), search=_partner_folders(host), progress=tell,
        make_room=_making_room(host, places),
    )  # fmt: skip
    return _given(host, flux)


def warm_up() -> None:
    """Import what the first model needs, which takes seconds; a host may do so while nobody waits."""
    import transformers

    from ..flux_runtime import generate, preview, weights  # noqa: F401 - imported for the time it takes

    for name in ("CLIPTextModel", "CLIPTokenizerFast", "T5EncoderModel", "T5TokenizerFast"):
        getattr(transformers, name)  # transformers imports a class's module when the class is first asked for
