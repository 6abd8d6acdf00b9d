"""Loading a model: every layout goes through the same steps, and what was found is in the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import FluxError
from ..flux import Flux, FluxModel
from ..schedule import Schedule
from ..text.encoders import TextEncoders
from ..text.tokenize import load_tokenizer
from ..vae import LatentFormat, Vae
from ..variants import VARIANTS, FluxParams, Variant, recognise
from . import build, shapes
from .contents import KINDS, Component
from .devices import choose_device, choose_dtype
from .files import stored_bytes
from .hub import Progress
from .report import Report, listed
from .sources import LABELS, Sources, complete, open_component, open_source, what_it_is

log = logging.getLogger("fluxcanvas")

LATENTS_PER_TOKEN = 4  # a token is 2x2 latents


def load_flux(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    tokenizers: str | Path | None = None,
    search: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Flux:
    """Load a model from `demo`, a diffusers folder, a single .safetensors file or a Hugging Face repository id.

    A bare transformer is completed from the model folders in `search`, where tokenizers are looked for too; `progress`
    is told what is being done and the fraction done of it. Whatever cannot be loaded is a `FluxError` with the remedy.
    """
    sources = open_source(source, progress)
    if "transformer" not in sources.components:
        raise FluxError(
            f"{sources.name} is no FLUX.1 model: {what_it_is(sources)}; choose a FLUX.1 transformer or a whole model"
        )
    params = shapes.transformer_params(sources.components["transformer"])
    sources = complete(sources, _fitting(params), search)
    return _load(sources, device, dtype, variant, tokenizers, search, progress)


def load_parts(
    *,
    transformer: str | Path,
    clip: str | Path | None,
    t5: str | Path | None,
    vae: str | Path | None,
    tokenizers: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    search: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Flux:
    """Load a model from a file or folder for each part; `None` leaves out the VAE, or both text encoders together."""
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
    return _load(sources, device, dtype, variant, tokenizers, search, progress)


def _name_of(path: Path) -> str:
    return (
        f"{path.parent.name} {path.name}"
        if path.is_dir() or path.name.startswith("diffusion_pytorch_model")
        else path.name
    )


def _load(
    sources: Sources,
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    variant: str | None,
    tokenizers: str | Path | None,
    search: Sequence[Path],
    progress: Progress | None,
) -> Flux:
    """Check everything by names and shapes first; read data only when nothing is amiss."""
    components = sources.components
    skeletons = {kind: build.skeleton(components[kind]) for kind in KINDS if kind in components}
    fits = {kind: build.compare(components[kind], module) for kind, module in skeletons.items()}
    for kind, fit in fits.items():
        build.refuse_unfit(components[kind], fit)
    params = skeletons["transformer"].params
    _check_together(params, components)
    chosen = choose_variant(params, variant, sources.hint)
    text_parts = _tokenizers(components, tokenizers, sources.folders, search)
    place = choose_device(device)
    kind_of_number = choose_dtype(
        dtype, place, sum(math.prod(t.shape) for c in components.values() for t in c.tensors.values())
    )
    modules = _fill_all(components, skeletons, place, kind_of_number, progress)
    note = f"loaded as {str(kind_of_number).removeprefix('torch.')} on {place}"
    report = Report(
        sources.name,
        tuple(build.describe(components[kind], fit, note) for kind, fit in fits.items()),
        chosen.name,
        _notes(sources),
    )
    _warn_unused(report, sources)
    return _assemble(modules, text_parts, chosen, choose_schedule(chosen, sources.scheduler), report)


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


def choose_variant(params: FluxParams, name: str | None, hint: str) -> Variant:
    """The variant named, checked against the shapes; else the one that shapes and hint tell."""
    if not name:
        return recognise(params, hint)
    if name not in VARIANTS:
        raise FluxError(f"there is no FLUX.1 variant {name!r}; use one of {', '.join(VARIANTS)}")
    chosen = VARIANTS[name]
    if (chosen.in_channels, chosen.guidance_embed) != (params.in_channels, params.guidance_embed):
        raise FluxError(
            f"this transformer is not FLUX.1 {name}: by its shapes it is {recognise(params, hint).name}; "
            "leave the variant empty"
        )
    return chosen


def choose_schedule(variant: Variant, config: Mapping[str, object] | None) -> Schedule:
    """The schedule of a scheduler_config.json, else that of the variant."""
    base = Schedule(dynamic=variant.dynamic_shift, shift=3.0 if variant.dynamic_shift else 1.0)
    if not config:
        return base
    names = {
        "shift": "shift", "base_shift": "base_shift", "max_shift": "max_shift",
        "base_image_seq_len": "base_tokens", "max_image_seq_len": "max_tokens",
    }  # fmt: skip
    told = {
        ours: value for theirs, ours in names.items()
        if isinstance(value := config.get(theirs), (int, float)) and math.isfinite(value) and value > 0
    }  # fmt: skip
    return replace(base, dynamic=bool(config.get("use_dynamic_shifting", base.dynamic)), **told)


def _tokenizers(
    components: Mapping[str, Component], named: str | Path | None, folders: Sequence[Path], search: Sequence[Path]
) -> dict[str, object]:
    """Both tokenizers; a folder that the user names is the only place looked in."""
    if not {"clip", "t5"} <= components.keys():
        return {}
    if named is not None and not Path(named).expanduser().is_dir():
        raise FluxError(
            f"the tokenizer folder {named} does not exist; name one that holds 'tokenizer' and 'tokenizer_2'"
        )
    bases = _tokenizer_folders([Path(named).expanduser()] if named is not None else [*folders, *search])
    rows = {"clip": "embeddings.token_embedding.weight", "t5": "shared.weight"}
    return {
        kind: load_tokenizer(kind, bases, components[kind].tensors[name].shape[0], download=named is None)
        for kind, name in rows.items()
    }


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
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, nn.Module]:
    sizes = {kind: stored_bytes(components[kind].tensors) for kind in skeletons}
    total, done, modules = max(sum(sizes.values()), 1), 0, {}
    for kind, module in skeletons.items():

        def tick(part: float, kind: str = kind, done: int = done) -> None:
            if progress:
                progress(f"loading the {LABELS[kind]}", (done + part * sizes[kind]) / total)

        tick(0.0)
        modules[kind] = build.fill(components[kind], module, device, dtype, tick)
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
