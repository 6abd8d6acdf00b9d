"""Checkpoints become a model, text encoders and a VAE."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..flux_runtime.variants import VARIANTS
from .edges import FLUX_MODEL, FLUX_TEXT, FLUX_VAE
from .host import Host, current, walk
from .schema import Output, node
from .widgets import Choice

if TYPE_CHECKING:
    import torch

    from ..flux_runtime.flux import Flux

log = logging.getLogger("fluxcanvas")
DEMO = "demo"
AUTO = "auto"
SOURCES = ("diffusers", "diffusion_models", "checkpoints")  # in this order when two folders hold one name
PARTNERS = ("text_encoders", "vae", "tokenizers", "diffusers")  # where a bare transformer finds the rest
PART_FOLDERS = {
    "transformer": ("diffusion_models", "checkpoints"),
    "clip": ("text_encoders",),
    "t5": ("text_encoders",),
    "vae": ("vae",),
}
DTYPES = (AUTO, "bfloat16", "float16", "float32")
DTYPE_HELP = "The precision to compute in. auto: what the files hold, or what the device does well."

Loaded = tuple[
    Annotated[FLUX_MODEL, Output("model"), "The transformer, for Sample."],
    Annotated[FLUX_TEXT, Output("text"), "The CLIP and T5 text encoders, for Encode Prompt."],
    Annotated[FLUX_VAE, Output("vae"), "The VAE, for Decode and Encode Image."],
]


def _sources() -> list[str]:
    host = current()
    found = [name for category in SOURCES for name in host.files(category)]
    return list(dict.fromkeys([DEMO, *found, *(variant.repo_id for variant in VARIANTS.values())]))


def _files(*categories: str) -> Callable[[], list[str]]:
    return lambda: list(dict.fromkeys(name for category in categories for name in current().files(category)))


def _tokenizers() -> list[str]:
    """Folders that hold both tokenizers: sub-folders of the tokenizers folders, and whole models."""
    pairs = (name.rpartition("/")[0] for name in current().files("tokenizers"))
    return list(dict.fromkeys([AUTO, *filter(None, pairs), *current().files("diffusers")]))


def _tokenizer_folder(host: Host, name: str) -> Path | None:
    if name == AUTO:
        return None
    inside = next((one for one in host.files("tokenizers") if one.rpartition("/")[0] == name), None)
    return host.resolve("tokenizers", inside).parent if inside else host.resolve("diffusers", name)


def _find(host: Host, name: str, categories: Iterable[str]) -> Path | None:
    """The path of a name offered by one of these categories; None when none offers it."""
    return next((host.resolve(category, name) for category in categories if name in host.files(category)), None)


def _locate(host: Host, source: str) -> str | Path:
    """What `load_flux` takes: "demo", a path, or a repo id of the table. A folder of that name comes first."""
    path = None if source == DEMO else _find(host, source, SOURCES)
    if path or source == DEMO or any(source == variant.repo_id for variant in VARIANTS.values()):
        return path or source
    return host.resolve(SOURCES[1], source)  # raises, naming the folders searched


def _state(paths: Iterable[Path]) -> str:
    """Changes when a file in `paths` (folders: those below them) is changed, added or removed."""
    files = (file for path in paths for file in (walk(path) if path.is_dir() else [path]))
    stats = ((file, file.stat()) for file in files)
    return "|".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)


def _source_state(source: str, **_: object) -> str:
    """A bare file depends on the folders where its partners lie too."""
    host = current()
    located = _locate(host, source)
    if isinstance(located, str):
        return located
    return _state([located, *([] if located.is_dir() else _partner_folders(host))])


def _partner_folders(host: Host) -> list[Path]:
    return [folder for category in PARTNERS for folder in host.folders(category) if folder.is_dir()]


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == AUTO else getattr(torch, name)


def _telling(host: Host) -> Callable[[str, float], None]:
    """A `progress` for the loader: shows each new message and the fraction done, and lets the host stop it.

    It speaks at once: importing what reads the text encoders takes seconds.
    """
    shown = [""]

    def tell(message: str, fraction: float) -> None:
        host.check_interrupt()
        host.progress(round(100 * fraction), 100)
        if message != shown[0]:
            shown[0] = message
            host.text(message)

    tell("opening the files", 0.0)
    return tell


def _make_room(host: Host, paths: Iterable[Path]) -> None:
    from ..flux_runtime.weights import inspect

    host.free_memory(sum(inspect(path).bytes for path in paths))


def _given(host: Host, flux: Flux) -> tuple[FLUX_MODEL, FLUX_TEXT, FLUX_VAE]:
    """The three outputs. What was loaded is shown on the node, with what was wrong with it; the log has it all."""
    full = flux.report.text()
    log.info(full)
    odd = [f"{part.name}: {len(part.unused)} tensors unused" for part in flux.report.parts if part.unused]
    host.text("\n".join([full.partition("\n")[0], *odd, *flux.report.notes]))
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
) -> Loaded:
    """Loads a FLUX.1 model: transformer, text encoders, VAE. A bare transformer finds the rest in the model folders."""
    host = current()
    tell = _telling(host)
    from ..flux_runtime.weights import load_flux as load

    located = _locate(host, source)
    if isinstance(located, Path):
        _make_room(host, [located])
    flux = load(located, device=host.device(), dtype=_dtype(dtype), search=_partner_folders(host), progress=tell)
    return _given(host, flux)


def _parts_state(transformer: str, clip: str, t5: str, vae: str, tokenizers: str, **_: object) -> str:
    host = current()
    chosen = _parts(host, transformer, clip, t5, vae)
    return _state([*chosen.values(), *filter(None, [_tokenizer_folder(host, tokenizers)])])


def _parts(host: Host, transformer: str, clip: str, t5: str, vae: str) -> dict[str, Path]:
    """The path of each part, looked for in its own folders; raises with the folders searched."""
    names = {"transformer": transformer, "clip": clip, "t5": t5, "vae": vae}
    return {
        part: _find(host, name, PART_FOLDERS[part]) or host.resolve(PART_FOLDERS[part][0], name)
        for part, name in names.items()
    }


@node("Load FLUX Parts", category="loaders", aliases=("dual clip", "unet", "load vae"), fingerprint=_parts_state)
def load_flux_parts(
    transformer: Annotated[str, Choice(_files(*PART_FOLDERS["transformer"])), "The transformer (flux1-*.safetensors)."],
    clip: Annotated[str, Choice(_files(*PART_FOLDERS["clip"])), "The CLIP-L text encoder (clip_l.safetensors)."],
    t5: Annotated[str, Choice(_files(*PART_FOLDERS["t5"])), "The T5-XXL text encoder (t5xxl_*.safetensors)."],
    vae: Annotated[str, Choice(_files(*PART_FOLDERS["vae"])), "The FLUX VAE (ae.safetensors)."],
    variant: Annotated[
        str,
        Choice((AUTO, *VARIANTS)),
        "Which FLUX.1 this is: it sets the recommended steps and guidance. auto: by weights and file name.",
    ] = AUTO,
    dtype: Annotated[str, Choice(DTYPES), DTYPE_HELP] = AUTO,
    tokenizers: Annotated[
        str,
        Choice(_tokenizers),
        "The folder with the CLIP and T5 tokenizers. auto: the first that fits, or the published ones.",
    ] = AUTO,
) -> Loaded:
    """Loads a FLUX.1 model from four files of their own, as they lie in ComfyUI's model folders."""
    host = current()
    tell = _telling(host)
    from ..flux_runtime.weights import load_parts

    chosen = _parts(host, transformer, clip, t5, vae)
    _make_room(host, chosen.values())
    flux = load_parts(
        **chosen, tokenizers=_tokenizer_folder(host, tokenizers), variant=None if variant == AUTO else variant,
        device=host.device(), dtype=_dtype(dtype), search=_partner_folders(host), progress=tell,
    )  # fmt: skip
    return _given(host, flux)


def warm_up() -> None:
    """Import what the first model needs, which takes seconds; a host may do so while nobody waits."""
    import transformers

    from ..flux_runtime import generate, preview, weights  # noqa: F401 - imported for the time it takes

    for name in ("CLIPTextModel", "CLIPTokenizerFast", "T5EncoderModel", "T5TokenizerFast"):
        getattr(transformers, name)  # transformers imports a class's module when the class is first asked for
