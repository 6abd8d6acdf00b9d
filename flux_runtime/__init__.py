"""FLUX.1 in pure PyTorch: load a checkpoint, encode a prompt, draw. The names here are the public ones."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Conditioning": "conditioning",
    "Flux": "flux",
    "FluxError": "errors",
    "FluxModel": "flux",
    "FluxParams": "variants",
    "Prompt": "conditioning",
    "Schedule": "schedule",
    "Step": "sampling",
    "VARIANTS": "variants",
    "Vae": "vae",
    "Variant": "variants",
    "denoise": "sampling",
    "inspect": "weights",
    "load_adapter": "weights",
    "load_controlnet": "weights",
    "load_flux": "weights",
    "load_image_encoder": "weights",
    "load_lora": "lora.load",
    "load_parts": "weights",
    "make_noise": "generate",
    "preview_image": "preview",
    "sample": "generate",
    "text_to_image": "recipes",
    "to_pil": "image",
    "to_tensor": "image",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Names are imported when they are first asked for, so that importing the package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
