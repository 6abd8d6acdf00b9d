"""From a component's tensors to a module: made on the meta device, checked by name and shape, filled without copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FluxError
from ..model.transformer import FluxTransformer
from ..model.vae import AutoEncoder
from ..quant.packed import Packed, PackedLinear
from ..quant.readers import unpack
from ..quant.swap import Quantiser
from . import shapes
from .contents import KINDS, Component
from .files import LazyTensor, stored_bytes
from .report import PartReport, listed

Tick = Callable[[float], None]  # told the fraction of a component that is loaded


@dataclass(frozen=True)
class Fit:
    """How a component's tensors and the module's own names agree."""

    used: tuple[str, ...]
    missing: tuple[str, ...]  # under the names of the file's layout
    unused: tuple[str, ...]
    misshapen: tuple[str, ...]


def skeleton(component: Component, make: Callable[[Component], nn.Module] | None = None) -> nn.Module:
    """The module that these tensors belong to (or that `make` makes), on the meta device: no memory for weights."""
    component.require_sound()
    make = make or {"transformer": _transformer, "vae": _vae, "clip": _clip, "t5": _t5}[component.kind]
    with torch.device("meta"):
        return make(component).eval().requires_grad_(False)


def _transformer(component: Component) -> nn.Module:
    return FluxTransformer(shapes.transformer_params(component))


def _vae(component: Component) -> nn.Module:
    return AutoEncoder(shapes.vae_params(component))


def configured(component: Component, config_class: str, arguments: dict[str, Any]) -> Any:
    import transformers

    try:
        return getattr(transformers, config_class)(**arguments)
    except Exception as error:  # transformers checks configs with exceptions of many kinds
        raise FluxError(
            f"{shapes.where(component)}: its config.json does not describe a {component.kind}: {error}"
        ) from error


def _clip(component: Component) -> nn.Module:
    config = configured(component, "CLIPTextConfig", shapes.clip_config(component))
    if config.hidden_size % config.num_attention_heads:
        raise FluxError(
            f"{shapes.where(component)}: a width of {config.hidden_size} does not divide into "
            f"{config.num_attention_heads} heads; its config.json belongs to another model"
        )
    from transformers import CLIPTextModel

    return CLIPTextModel(config)


def _t5(component: Component) -> nn.Module:
    config = configured(component, "T5Config", shapes.t5_config(component))
    from transformers import T5EncoderModel

    return T5EncoderModel(config)


# Some versions of transformers have these in the names of their encoders, and some have not.
WRAPPERS = {"clip": "text_model.", "image encoder": "vision_model."}


def plain_name(kind: str, name: str) -> str:
    """The component's own spelling of a module's tensor."""
    return name.removeprefix(WRAPPERS.get(kind, ""))


def wanted(component: Component, module: nn.Module) -> dict[str, Tensor]:
    """The tensors a module waits for, by its own names; T5's second name of its embedding is left out."""
    state = module.state_dict()
    if component.kind == "t5":
        state.pop("encoder.embed_tokens.weight", None)
    return {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}


def compare(component: Component, module: nn.Module) -> Fit:
    """What is there, what is not, and what has another shape."""
    expected = {plain_name(component.kind, name): tuple(t.shape) for name, t in wanted(component, module).items()}
    have = component.tensors
    used = tuple(name for name in expected if name in have)
    missing = [part for name in expected if name not in have for part in component.stored_names(name)]
    unused = (
        *component.unknown,
        *(part for name in have if name not in expected for part in _sources(component, name)),
    )
    misshapen = tuple(
        f"{name} {list(have[name].shape)} instead of {list(expected[name])}"
        for name in used
        if have[name].shape != expected[name]
    )
    return Fit(used, tuple(missing), unused, misshapen)


def _sources(component: Component, name: str) -> list[str]:
    return [stored.name for stored in component.tensors[name].sources]


def describe(component: Component, fit: Fit, note: str = "") -> PartReport:
    """The part of the report about a component."""
    by_type: dict[str, int] = {}
    for tensor in component.tensors.values():
        for stored in dict.fromkeys(tensor.sources):
            by_type[stored.dtype] = by_type.get(stored.dtype, 0) + stored.nbytes
    held = {stored.name: stored.parameters for tensor in component.tensors.values() for stored in tensor.sources}
    used = {stored.name for name in fit.used for stored in component.tensors[name].sources}
    return PartReport(
        component.kind,
        component.layout,
        component.files,
        dict(sorted(by_type.items(), key=lambda item: -item[1])),
        sum(held.values()),
        len(used),
        fit.unused,
        component.spare,
        fit.missing,
        note,
    )


def refuse_unfit(component: Component, fit: Fit) -> None:
    """A `FluxError` unless every tensor of the module is there in its shape."""
    place = shapes.where(component)
    if component.unreadable:
        raise FluxError(
            f"{place}: the {component.kind} is stored as {component.unreadable}, which is not read here; "
            "use its bf16, fp16, fp8, GGUF or bitsandbytes file instead"
        )
    if fit.missing:
        parts = ", or load the parts from files of their own with LoadFluxParts (load_parts)"
        remedy = f"download it again{parts if component.kind in KINDS else ''}"
        raise FluxError(f"{place} is not a whole {component.kind}: it lacks {listed(fit.missing)}; {remedy}")
    if fit.misshapen:
        raise FluxError(
            f"{place}: the {component.kind} has tensors of the wrong shape, {listed(fit.misshapen)}; "
            "it is damaged or of another model"
        )


def fill(
    component: Component,
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    tick: Tick | None = None,
    pack: Quantiser | None = None,
) -> nn.Module:
    """Put the tensors into the skeleton; those that already have dtype and device stay the mapped file's memory.

    A linear layer whose weight is packed in the file becomes a `PackedLinear`; so does one that `pack` packs.
    """
    names, state = wanted(component, module), {}
    total, done = max(stored_bytes(component.tensors), 1), 0
    for name in names:
        tensor = component.tensors[plain_name(component.kind, name)]
        own = _dtype_of(component.kind, name, dtype)
        packs = _packs(module, name, tensor, device, own, pack) if own == dtype else []
        if packs:
            _replace_linear(module, name.removesuffix(".weight"), packs, pack)
        else:
            state[name] = tensor.read(device, own)
        done += sum(stored.nbytes for stored in tensor.sources)
        if tick:
            tick(min(done / total, 1.0))
    if component.kind == "t5" and "encoder.embed_tokens.weight" in module.state_dict():
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    module.load_state_dict(state, assign=True, strict=False)
    _finish(module, device)
    return module.requires_grad_(False)


def _packs(
    module: nn.Module, name: str, tensor: LazyTensor, device: torch.device, dtype: torch.dtype, pack: Quantiser | None
) -> list[Packed]:
    """The packed weights that make up a linear layer's; none where it is to be plain numbers."""
    owner, _, kind = name.rpartition(".")
    if kind != "weight" or type(module.get_submodule(owner)) is not nn.Linear:
        return []
    if tensor.packed:
        return [unpack(p.stored, device) for p in tensor.pieces] if all(p.whole for p in tensor.pieces) else []
    packed = pack(owner, lambda: tensor.read(device, dtype)) if pack else None
    return [packed] if packed is not None else []


def _replace_linear(module: nn.Module, name: str, packs: list[Packed], pack: Quantiser | None) -> None:
    """Put packed weights in a linear layer's place; those of a file are packed anew where that loses nothing more."""
    owner, _, child = name.rpartition(".")
    parent = module.get_submodule(owner)
    linear = PackedLinear(packs, getattr(parent, child).bias)
    if pack:
        pack.refuse(name, linear)
        linear = pack.layer(name, linear)
    setattr(parent, child, linear)


def _dtype_of(kind: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """T5's last feed-forward matrix overflows float16, so it stays float32, as transformers has it."""
    return torch.float32 if kind == "t5" and dtype == torch.float16 and name.endswith(".wo.weight") else dtype


def _finish(module: nn.Module, device: torch.device) -> None:
    """Give real memory to the one buffer that no file holds, and share T5's embedding between its two names."""
    for part in module.modules():
        ids = getattr(part, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:
            part.position_ids = torch.arange(ids.shape[-1], device=device).expand(ids.shape)
    if hasattr(module, "shared") and hasattr(module, "encoder"):
        module.encoder.embed_tokens = module.shared
    unfilled = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]
    if unfilled:
        raise RuntimeError(f"tensors without memory after loading: {listed(unfilled)}")
