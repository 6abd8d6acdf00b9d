"""Weights in fewer bits, and models saved with what was done to them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..flux_runtime.errors import FluxError
from .edges import FLUX_MODEL, FLUX_TEXT, STRING
from .host import Host, current
from .schema import Output, node
from .widgets import Choice, Text

if TYPE_CHECKING:
    from torch import nn

NONE = "none"
SCHEMES = (  # what each is stands in quant.schemes, which imports torch
    NONE, "fp8", "fp8-matmul", "bnb-int8", "bnb-nf4", "bnb-fp4", "quanto-float8", "quanto-int8", "quanto-int4",
    "torchao-int8", "torchao-float8",
)  # fmt: skip
SAVED_TO = "diffusion_models"
SCHEME_HELP = (
    "fp8 needs no other library; fp8-matmul is fast on GPUs that multiply float8; bnb- needs bitsandbytes, quanto- "
    "optimum-quanto, torchao- torchao."
)


@node("Quantize", category="model", aliases=("fp8", "nf4", "int8", "bitsandbytes", "quanto", "torchao", "compress"))
def quantize(
    scheme: Annotated[
        str, Choice(SCHEMES), f"How the transformer's weights are stored. none: as they are. {SCHEME_HELP}"
    ] = "fp8",
    t5_scheme: Annotated[
        str,
        Choice(SCHEMES),
        "How T5's weights are stored, the larger text encoder; the same names. CLIP stays as it is.",
    ] = NONE,
    keep: Annotated[
        str,
        Text(multiline=True, placeholder="double_blocks.0, *.img_mod.lin", longest=10_000),
        "Layers to leave as they are besides the first and the last, by name; * stands for anything. Usually empty.",
    ] = "",
    model: Annotated[FLUX_MODEL | None, "The model, from Load FLUX."] = None,
    text: Annotated[FLUX_TEXT | None, "The text encoders, from Load FLUX."] = None,
) -> tuple[
    Annotated[FLUX_MODEL, Output("model"), "The smaller model; the one that came in stays as it is."],
    Annotated[FLUX_TEXT, Output("text"), "The text encoders with a smaller T5."],
]:
    """Stores a model's weights in fewer bits, so that it needs less memory. Shows what was saved and what it costs."""
    host = current()
    wanted = {}
    if model is not None and scheme != NONE:
        wanted["transformer"] = (model.transformer, scheme)
    if text is not None and t5_scheme != NONE:
        wanted["T5"] = (text.t5, t5_scheme)
    if not wanted:
        raise FluxError(
            "Quantize has nothing to do: connect a model and choose its scheme, or connect text and choose a t5_scheme"
        )
    names = _patterns(keep, [module for module, _ in wanted.values()])
    told, made = [], {}
    for part, (module, chosen) in wanted.items():
        made[part], line = _quantised(host, part, module, chosen, names)
        told.append(line)
    host.text("\n".join(told))
    model = replace(model, transformer=made["transformer"]) if "transformer" in made else model
    return model, replace(text, t5=made["T5"]) if "T5" in made else text


def _patterns(keep: str, modules: Sequence[nn.Module]) -> tuple[str, ...]:
    """The names and patterns of a text; one that fits no layer is a mistake."""
    patterns = tuple(filter(None, re.split(r"[\s,;]+", keep)))
    layers = [name for module in modules for name, _ in module.named_modules()]
    for pattern in patterns:
        if not any(name.startswith(f"{pattern}.") or fnmatchcase(name, pattern) for name in layers):
            raise FluxError(f"Quantize: {pattern[:80]!r} in keep fits no layer; names are such as double_blocks.0")
    return patterns


def _quantised(host: Host, part: str, module: nn.Module, chosen: str, keep: Sequence[str]) -> tuple[nn.Module, str]:
    """The quantised copy, and what became of it in words."""
    from ..flux_runtime.quant.schemes import scheme
    from ..flux_runtime.quant.swap import KEPT, quantise
    from ..flux_runtime.weights.report import listed

    host.free_memory(int(sum(p.numel() for p in module.parameters()) * scheme(chosen).bits / 8))
    tell = _telling(host, f"quantising the {part}")
    made, summary = quantise(module, chosen, keep=(*KEPT, *keep), part=part, progress=tell)
    kept = f"\n  as they were: {listed(list(summary.kept))}" if summary.kept else ""
    return made, f"{part}: {summary}{kept}"


def _telling(host: Host, message: str) -> Callable[[float], None]:
    """Shows what is being done, then the fraction done of it, and lets the host stop it."""
    host.text(message)

    def tell(fraction: float) -> None:
        host.check_interrupt()
        host.progress(round(100 * fraction), 100)

    return tell


@node("Save Model", category="model", aliases=("export", "save quantized", "safetensors"), output_node=True)
def save_model(
    model: Annotated[FLUX_MODEL, "The model, from Quantize or Load FLUX."],
    filename_prefix: Annotated[
        str,
        Text(longest=200),
        "How the file's name begins; it may name a sub-folder (mine/flux). A number follows.",
    ] = "flux1",
) -> Annotated[STRING, Output("path"), "Where the file is."]:
    """Saves the transformer as one file in diffusion_models, as it is stored now, for Load FLUX and Load FLUX Parts."""
    from ..flux_runtime.quant.save import save_module
    from ..flux_runtime.weights.identity import header_of
    from ..flux_runtime.weights.report import human

    host = current()
    path = _free_path(_folder(host), filename_prefix)
    tell = _telling(host, f"saving {path.name}")
    size = save_module(model.transformer, path, metadata=header_of(model), progress=tell)
    lines = [f"saved {path}", human(size, "B", 1000)]
    if model.loras:
        names = ", ".join(entry.lora.name for entry in model.loras.entries)
        lines.append(f"without the LoRAs, which stay files of their own: {names}")
    host.text("\n".join(lines))
    return str(path)


def _folder(host: Host) -> Path:
    """The models folder that new transformers go to: of several, the one that bears its name."""
    folders = host.folders(SAVED_TO)
    if not folders:
        raise FluxError(f"there is no folder for {SAVED_TO}: give the host a models folder")
    return next((folder for folder in folders if folder.name == SAVED_TO), folders[0])


def _free_path(folder: Path, prefix: str) -> Path:
    """`<prefix>_00001.safetensors` in the folder, under the first number that is free."""
    parts = [part.strip() for part in prefix.replace("\\", "/").split("/")]
    if any(not part.strip(".") or re.search(r'[<>:"|?*\x00-\x1f]', part) for part in parts):
        raise FluxError(
            f"Save Model: the filename_prefix {prefix[:80]!r} is no name for a file; use letters and digits, "
            "and / for a sub-folder"
        )
    place = folder.joinpath(*parts[:-1])
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxError(f"Save Model: the folder {place} cannot be made: {error.strerror}; choose another") from error
    taken = {path.name for path in place.iterdir()}
    return next(
        place / file for number in itertools.count(1) if (file := f"{parts[-1]}_{number:05}.safetensors") not in taken
    )
