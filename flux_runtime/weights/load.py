"""Loading a model: every layout goes through the same steps, and what was found is in the report."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import FluxError
from ..flux import Flux, FluxModel
from ..quant.packed import Packed
from ..quant.schemes import scheme as scheme_of
from ..quant.swap import Quantiser
from ..schedule import Schedule
from ..text.encoders import TextEncoders
from ..text.tokenize import load_tokenizer
from ..vae import LatentFormat, Vae
from ..variants import FluxParams, Variant
from . import build, shapes
from .contents import KINDS, Component
from .devices import Devices, choose_dtype, main_device, place
from .files import stored_bytes
from .hub import Progress
from .identity import choose_schedule, choose_variant
from .report import Report, listed
from .sources import LABELS, Sources, complete, open_component, open_source, what_it_is

log = logging.getLogger("fluxcanvas")

LATENTS_PER_TOKEN = 4  # a token is 2x2 latents


@dataclass(frozen=True)
class Wishes:
    """What a caller wants besides the files; see `load_flux`."""

    device: Devices = None
    dtype: torch.dtype | str | None = None
    quantize: str | Mapping[str, str] | None = None
    variant: str | None = None
    tokenizers: str | Path | None = None
    search: Sequence[Path] = ()
    progress: Progress | None = None
    make_room: Callable[[Mapping[str, int]], None] | None = None


def load_flux(
    source: str | Path,
    *,
    device: Devices = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | Mapping[str, str] | None = None,
    variant: str | None = None,
    tokenizers: str | Path | None = None,
    search: Sequence[Path] = (),
    progress: Progress | None = None,
    make_room: Callable[[Mapping[str, int]], None] | None = None,
) -> Flux:
    """Load a model from `demo`, a diffusers folder, a .safetensors or .gguf file or a Hugging Face repository id.

    `device` is one for all parts, or a table by part (`transformer`, `clip`, `t5`, `vae`), or `balanced` over all GPUs.
    `quantize` packs plain weights while they are read: a scheme (`fp8`, `bnb-nf4`, ... see `quant.SCHEMES`) for the
    transformer and for T5, which stays as it is where its file has it packed; or a table by part. A bare transformer
    is completed from the model folders in `search`, where tokenizers are looked for too; `progress` is told what is
    being done and the fraction done of it; `make_room` is told, before anything is read, how many bytes each part will
    take. Whatever cannot be loaded is a `FluxError` with the remedy.
    """
    wishes = Wishes(device, dtype, quantize, variant, tokenizers, search, progress, make_room)
    sources = open_source(source, progress)
    if "transformer" not in sources.components:
        raise FluxError(
            f"{sources.name} is no FLUX.1 model: {what_it_is(sources)}; choose a FLUX.1 transformer or a whole model"
        )
    sources.components["transformer"].require_sound()
    params = shapes.transformer_params(sources.components["transformer"])
    return _load(complete(sources, _fitting(params), search), wishes)


def load_parts(
    *,
    transformer: str | Path,
    clip: str | Path | None,
    t5: str | Path | None,
    vae: str | Path | None,
    tokenizers: str | Path | None = None,
    device: Devices = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | Mapping[str, str] | None = None,
    variant: str | None = None,
    search: Sequence[Path] = (),
    progress: Progress | None = None,
    make_room: Callable[[Mapping[str, int]], None] | None = None,
) -> Flux:
    """Load a model from a file or folder for each part; `None` leaves out the VAE, or both text encoders together.

    The options are those of `load_flux`.
    """
    if (clip is None) != (t5 is None):
        raise FluxError("CLIP and T5 read a prompt together: name a file for both, or for neither")
    named = {"transformer": transformer, "clip": clip, "t5": t5, "vae": vae}
    paths = {kind: Path(path).expanduser() for kind, path in named.items() if path is not None}
    components = {kind: open_component(path, kind) for kind, path in paths.items()}
    folders = [
        p
        for path in paths.values()
        for p in ((path, path.parent) if path.is_dir() else (path.parent, path.parent.parent))
    ]
    sources = Sources(
        paths["transformer"].name, components, tuple(dict.fromkeys(folders)), hint=_name_of(paths["transformer"])
    )
    return _load(sources, Wishes(device, dtype, quantize, variant, tokenizers, search, progress, make_room))


def _name_of(path: Path) -> str:
    return (
        f"{path.parent.name} {path.name}"
        if path.is_dir() or path.name.startswith("diffusion_pytorch_model")
        else path.name
    )


def _load(sources: Sources, wishes: Wishes) -> Flux:
    """Check everything by names and shapes first; read data only when nothing is amiss."""
    components = sources.components
    skeletons = {kind: build.skeleton(components[kind]) for kind in KINDS if kind in components}
    fits = {kind: build.compare(components[kind], module) for kind, module in skeletons.items()}
    for kind, fit in fits.items():
        build.refuse_unfit(components[kind], fit)
    params = skeletons["transformer"].params
    _check_together(params, components)
    chosen = choose_variant(params, wishes.variant, sources.variant_hint)
    schedule = choose_schedule(chosen, sources.schedule)
    text_parts = _tokenizers(components, wishes.tokenizers, sources.folders, wishes.search)
    schemes = _schemes(wishes.quantize, components)
    numbers, meant = _plain_numbers(components, schemes), main_device(wishes.device)
    dtype = choose_dtype(wishes.dtype, meant, numbers)
    sizes = {kind: _held_bytes(components[kind], schemes.get(kind), dtype) for kind in skeletons}
    if wishes.make_room:
        wishes.make_room(sizes)
    places = place(sizes, wishes.device)
    if places["transformer"].type != meant.type:  # no GPU had room for it, and the CPU computes in another type
        dtype = choose_dtype(wishes.dtype, places["transformer"], numbers)
    packers = {part: Quantiser(name, places[part], dtype, part=LABELS[part]) for part, name in schemes.items()}
    modules = _fill_all(components, skeletons, places, dtype, packers, wishes.progress)
    report = Report(
        sources.name,
        tuple(build.describe(components[kind], fit, _note(modules[kind], dtype)) for kind, fit in fits.items()),
        chosen.name,
        (*_notes(sources), *_left_packed(wishes.quantize, components, schemes)),
    )
    _warn_unused(report, sources)
    return _assemble(modules, text_parts, chosen, schedule, report)


def _schemes(quantize: str | Mapping[str, str] | None, components: Mapping[str, Component]) -> dict[str, str]:
    """The scheme of each part that is to be quantised while it is read.

    One name means the transformer, and T5 too unless it is packed already: nobody asked for T5 by name.
    """
    if not quantize:
        return {}
    if isinstance(quantize, str):
        packed = "t5" in components and _packing_of(components["t5"])
        quantize = dict.fromkeys(("transformer",) if packed else ("transformer", "t5"), quantize)
    table = dict(quantize)
    odd = [part for part in table if part not in KINDS]
    if odd:
        raise FluxError(f"{odd[0]!r} is no part of a model: name schemes for {', '.join(KINDS)}")
    return {part: name for part, name in table.items() if part in components and name}


def _packing_of(component: Component) -> str:
    """How a part's file has it packed; an empty text where it does not, or in fp8, which is quantised anew."""
    packings = (stored.packing for t in component.tensors.values() for stored in t.sources)
    return next((packing.title for packing in packings if packing and packing.scheme != "fp8"), "")


def _left_packed(
    quantize: str | Mapping[str, str] | None, components: Mapping[str, Component], schemes: Mapping[str, str]
) -> tuple[str, ...]:
    """A word on T5 where it is left out of what one name asks for."""
    if not isinstance(quantize, str) or not quantize or "t5" not in components or "t5" in schemes:
        return ()
    return (f"the {LABELS['t5']} stays {_packing_of(components['t5'])}, as its file has it, and not {quantize}",)


def _held_bytes(component: Component, scheme: str | None, dtype: torch.dtype) -> int:
    """What a part takes once it is loaded; weights that its file has packed stay packed unless a scheme packs them."""
    bits = scheme_of(scheme).bits if scheme else 8 * dtype.itemsize
    stay = [t for t in component.tensors.values() if t.packed and not scheme]
    numbers = sum(math.prod(t.shape) for t in component.tensors.values() if scheme or not t.packed)
    return sum(stored.nbytes for t in stay for stored in t.sources) + int(numbers * bits / 8)


def _plain_numbers(components: Mapping[str, Component], schemes: Mapping[str, str]) -> int:
    """How many numbers are to be held in the type of the model."""
    kept = [c for kind, c in components.items() if kind not in schemes]
    return sum(math.prod(t.shape) for c in kept for t in c.tensors.values() if not t.packed)


def _note(module: nn.Module, dtype: torch.dtype) -> str:
    """What became of a part."""
    place = next(module.parameters()).device
    packed = Counter(pack.scheme for pack in module.modules() if isinstance(pack, Packed))
    kinds = "".join(f", {count} layers as {scheme}" for scheme, count in packed.items())
    return f"loaded as {str(dtype).removeprefix('torch.')} on {place}{kinds}"


def _fitting(params: FluxParams) -> Mapping[str, Callable[[Component], bool]]:
    """For each kind, whether a component has the sizes that this transformer needs."""

    def size(component: Component, name: str, axis: int) -> int:
        tensor = component.tensors.get(name)
        return tensor.shape[axis] if tensor is not None and len(tensor.shape) > axis else 0

    return {
        "clip": lambda c: size(c, "embeddings.token_embedding.weight", 1) == params.vec_in_dim,
        "t5": lambda c: size(c, "shared.weight", 1) == params.context_in_dim,
        "vae": lambda c: size(c, "decoder.conv_in.weight", 1) * LATENTS_PER_TOKEN == params.out_channels,
    }


def _check_together(params: FluxParams, components: Mapping[str, Component]) -> None:
    for kind, fits in _fitting(params).items():
        if kind in components and not fits(components[kind]):
            needs = {
                "clip": params.vec_in_dim,
                "t5": params.context_in_dim,
                "vae": params.out_channels // LATENTS_PER_TOKEN,
            }[kind]
            raise FluxError(
                f"{shapes.where(components[kind])}: this {LABELS[kind]} does not go with the transformer, "
                f"which needs one of {needs} channels; name the one of the same model"
            )


def _tokenizers(
    components: Mapping[str, Component], named: str | Path | None, folders: Sequence[Path], search: Sequence[Path]
) -> dict[str, object]:
    """Both tokenizers; a folder that the user names is the only place looked in.

    Elsewhere a folder `tokenizers` may have those of many models, each in a folder of its own.
    """
    if not {"clip", "t5"} <= components.keys():
        return {}
    if named is not None and not Path(named).expanduser().is_dir():
        raise FluxError(
            f"the tokenizer folder {named} does not exist; name one that holds 'tokenizer' and 'tokenizer_2'"
        )
    bases = _tokenizer_folders([Path(named).expanduser()] if named is not None else [*folders, *search])
    several = [] if named is not None else [inner for base in bases for inner in _folders_in(base, search)]
    rows = {"clip": "embeddings.token_embedding.weight", "t5": "shared.weight"}
    return {
        kind: load_tokenizer(
            kind, bases, components[kind].tensors[name].shape[0], download=named is None, several=several
        )
        for kind, name in rows.items()
    }


def _folders_in(base: Path, search: Sequence[Path]) -> list[Path]:
    """The folders in one that is for tokenizers, or that was named to be searched."""
    if not base.is_dir() or (base.name != "tokenizers" and base not in search):
        return []
    return sorted(inner for inner in base.iterdir() if inner.is_dir())


def _tokenizer_folders(search: Sequence[Path]) -> list[Path]:
    """The given folders, and a folder `tokenizers` in or beside each."""
    return list(
        dict.fromkeys(
            place for folder in search for place in (folder, folder / "tokenizers", folder.parent / "tokenizers")
        )
    )


def _fill_all(
    components: Mapping[str, Component],
    skeletons: Mapping[str, nn.Module],
    places: Mapping[str, torch.device],
    dtype: torch.dtype,
    packers: Mapping[str, Quantiser],
    progress: Progress | None,
) -> dict[str, nn.Module]:
    sizes = {kind: stored_bytes(components[kind].tensors) for kind in skeletons}
    total, done, modules = max(sum(sizes.values()), 1), 0, {}
    for kind, module in skeletons.items():

        def tick(part: float, kind: str = kind, done: int = done) -> None:
            if progress:
                progress(f"loading the {LABELS[kind]}", (done + part * sizes[kind]) / total)

        tick(0.0)
        modules[kind] = build.fill(components[kind], module, places[kind], dtype, tick, packers.get(kind))
        done += sizes[kind]
    return modules


def _notes(sources: Sources) -> tuple[str, ...]:
    notes = [f"without its {LABELS[kind]}, as its model_index.json says" for kind in sources.absent]
    return (*notes, *([f"unused: {listed(sources.leftover)}"] if sources.leftover else []))


def _warn_unused(report: Report, sources: Sources) -> None:
    unused = [f"{part.name} {listed(part.unused)}" for part in report.parts if part.unused]
    unused += [listed(sources.leftover)] if sources.leftover else []
    if unused:
        log.warning("%s has tensors that no part of FLUX.1 uses: %s", report.source, "; ".join(unused))


def _assemble(
    modules: Mapping[str, nn.Module],
    tokenizers: Mapping[str, object],
    variant: Variant,
    schedule: Schedule,
    report: Report,
) -> Flux:
    vae = Vae(modules["vae"]) if "vae" in modules else None
    latent = vae.latent_format if vae else LatentFormat(modules["transformer"].params.out_channels // LATENTS_PER_TOKEN)
    text = None
    if tokenizers:
        text = TextEncoders(
            modules["clip"], modules["t5"], tokenizers["clip"], tokenizers["t5"], variant.max_tokens, variant.name
        )
    return Flux(FluxModel(modules["transformer"], variant, schedule, latent, vae), text, vae, report)
