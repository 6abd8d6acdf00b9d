"""Which model categories there are, which folders hold them, and ComfyUI's extra_model_paths.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...flux_runtime.errors import FluxError

# Category -> the folders below a models root that hold it; the names are ComfyUI's.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "vae_approx": ("vae_approx",),
    "loras": ("loras",),
    "controlnet": ("controlnet", "t2i_adapter"),
    "clip_vision": ("clip_vision",),
    "style_models": ("style_models",),
    "ipadapter": ("ipadapter",),
    "xlabs_controlnets": ("xlabs/controlnets",),
    "xlabs_ipadapters": ("xlabs/ipadapters",),
    "model_patches": ("model_patches",),
    "upscale_models": ("upscale_models",),
    "embeddings": ("embeddings",),
    "tokenizers": ("tokenizers",),
    "diffusers": ("diffusers",),
    "depth": ("depth",),
    "integrity": ("integrity",),
}
ALIASES = {"unet": "diffusion_models", "clip": "text_encoders"}


def category_name(category: str) -> str:
    """The present name of a category that may be given by an old one."""
    return ALIASES.get(category, category)


def read_extra_paths(path: Path) -> list[tuple[str, Path, bool]]:
    """The (category, folder, is_default) entries of an extra_model_paths.yaml; FluxError when it is not one.

    Follows ComfyUI: `base_path` may be relative to the file and hold `~` and variables, a value may name several
    folders on lines of their own, `is_default` puts a section's folders first.
    """
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FluxError(f"The model path file {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FluxError(f"The model path file {path} is not valid YAML: {error}") from error
    if sections is None:
        return []
    if not isinstance(sections, dict):
        raise FluxError(f"The model path file {path} must hold named sections, as extra_model_paths.yaml does.")
    return [
        entry
        for name, section in sections.items()
        if section is not None
        for entry in _section(path, str(name), section)
    ]


def _section(path: Path, name: str, section: Any) -> list[tuple[str, Path, bool]]:
    """The entries of one section of the file."""
    if not isinstance(section, dict):
        raise FluxError(f"Section {name!r} of {path} must be a list of 'category: folder' lines.")
    base = path.resolve().parent
    if section.get("base_path"):
        base = base / os.path.expandvars(os.path.expanduser(str(section["base_path"])))
    is_default = bool(section.get("is_default", False))
    entries = []
    for category, value in section.items():
        if category in ("base_path", "is_default") or value is None:
            continue
        if not isinstance(value, str):
            raise FluxError(f"{category!r} in section {name!r} of {path} must name a folder.")
        lines = (line.strip() for line in value.splitlines())
        entries += [
            (category_name(str(category)), Path(os.path.normpath(base / line)), is_default) for line in lines if line
        ]
    return entries
