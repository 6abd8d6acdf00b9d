"""Which variant a model is and how it spaces its noise: by what is named, by shapes, and by what its file says.

A single file has no scheduler_config.json and no config.json beside it. One that Save Model writes keeps what they
would say in its header, under `HEADER`: `{"variant": "dev", "scheduler": {...}, "transformer": {...}}`, the last two
under diffusers' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import FluxError
from ..schedule import Schedule
from ..variants import VARIANTS, FluxParams, Variant, recognise
from .files import number_in

if TYPE_CHECKING:
    from ..flux import FluxModel

HEADER = "fluxcanvas.model"
ROPE_AXES = "axes_dims_rope"  # all that shapes do not tell of a transformer
SCHEDULER = {  # diffusers' names of the numbers of a schedule
    "shift": "shift", "base_shift": "base_shift", "max_shift": "max_shift",
    "base_image_seq_len": "base_tokens", "max_image_seq_len": "max_tokens",
}  # fmt: skip


def header_of(model: FluxModel) -> dict[str, str]:
    """What a single file of this model's transformer needs in its header to draw as the model does."""
    schedule = {theirs: getattr(model.schedule, ours) for theirs, ours in SCHEDULER.items()}
    told = {
        "variant": model.variant.name,
        "scheduler": {"use_dynamic_shifting": model.schedule.dynamic, **schedule},
        "transformer": {ROPE_AXES: model.transformer.params.axes_dim},
    }
    return {HEADER: json.dumps(told)}


def told_by(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file's header says under `HEADER`; nothing of what is not sound, since headers are not trusted."""
    try:
        raw = json.loads(metadata.get(HEADER, "{}"))
    except (ValueError, RecursionError):
        return {}
    told = raw if isinstance(raw, dict) else {}
    found = {name: told[name] for name in ("scheduler", "transformer") if isinstance(told.get(name), dict)}
    if "transformer" in found:
        found["transformer"] = {name: value for name, value in found["transformer"].items() if name == ROPE_AXES}
    return found | ({"variant": told["variant"]} if told.get("variant") in [*VARIANTS] else {})


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
    told = {ours: number_in(config, theirs, getattr(base, ours)) for theirs, ours in SCHEDULER.items()}
    told = {name: value if value > 0 else getattr(base, name) for name, value in told.items()}
    return replace(base, dynamic=bool(config.get("use_dynamic_shifting", base.dynamic)), **told)
