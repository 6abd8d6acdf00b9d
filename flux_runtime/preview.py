"""A quick look at latents while they are being drawn."""

from __future__ import annotations

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .image import to_pil
from .vae import Vae


def preview_image(vae: Vae, clean: Tensor, max_side: int = 256) -> Image.Image:
    """The first of (B, C, h, w) model-space latents as a small picture: a linear map, no decoding."""
    weights, bias = vae.preview_factors
    latents = clean[:1].float().cpu()
    colours = (latents.permute(0, 2, 3, 1) @ weights + bias).clamp(0, 1)
    zoom = max(1, max_side // max(latents.shape[2:]))
    shown = F.interpolate(colours.permute(0, 3, 1, 2), scale_factor=float(zoom), mode="bilinear")
    return to_pil(shown.clamp(0, 1).permute(0, 2, 3, 1))[0]
