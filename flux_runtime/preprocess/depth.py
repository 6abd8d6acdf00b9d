"""Depth maps, for the models that draw into them: near is white."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import FluxError
from ..pretrained import load_model, load_processor, without_torchvision
from ..weights.devices import choose_device

log = logging.getLogger("fluxcanvas")

DEFAULT = "LiheYoung/depth-anything-large-hf"
METHODS = ("plain", "prepared")


@dataclass(frozen=True)
class DepthEstimator:
    """A depth model of transformers (Depth Anything, DPT); a shared handle that is never changed.

    `auxiliary` is image_gen_aux's DepthPreprocessor around the same model, where that package is installed.
    """

    model: torch.nn.Module
    processor: Any = None
    auxiliary: Any = None

    @classmethod
    def load(cls, source: str | Path = DEFAULT, device: torch.device | str | None = None) -> DepthEstimator:
        """From a folder or repository in transformers' layout."""
        import transformers

        what = "a depth model (Depth Anything or DPT, in transformers' layout)"
        model = load_model(transformers.AutoModelForDepthEstimation, source, what).to(choose_device(device))
        processor = load_processor(without_torchvision("DPTImageProcessor"), source, what)
        return cls(model, processor, _auxiliary(model))

    @torch.inference_mode()
    def estimate(self, images: Tensor, method: str = "plain", invert: bool = False) -> Tensor:
        """(B, H, W, 3) in 0..1 -> depth in 0..1, (B, H, W, 3) of three equal channels, on the CPU.

        "plain" shows the model the pixels as they are, which is what image_gen_aux does and so what the FLUX.1 Depth
        examples show. "prepared" resizes and normalises them as the checkpoint asks, which is what Black Forest Labs'
        own code does, and finds more in large pictures.

        Each picture is stretched to 0..1 by itself. image_gen_aux stretches a batch as one, so that there a picture's
        map depends on its neighbours; it is shown one picture at a time here.
        """
        if method not in METHODS:
            raise FluxError(f"the depth method {method!r} is unknown; use {', '.join(METHODS)}")
        pixels = images[..., :3].permute(0, 3, 1, 2).float().clamp(0, 1)
        predict = {"plain": self._plain, "prepared": self._prepared}[method]
        maps = torch.cat([_stretched(predict(one[None])) for one in pixels])
        maps = 1 - maps if invert else maps
        return maps.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).float().cpu()

    def _plain(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 1, H, W)."""
        pixels = pixels.to(self.model.device, self.model.dtype)
        if self.auxiliary is not None:
            return self.auxiliary(pixels, return_type="pt")
        depth = self._predict(pixels)
        if depth.shape[-2:] != pixels.shape[-2:]:
            depth = F.interpolate(depth, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        return depth

    def _prepared(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, 1, H, W)."""
        levels = (pixels[0] * 255).round().to(torch.uint8).cpu().numpy()
        inputs = self.processor(levels, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        depth = self._predict(inputs.to(self.model.device, self.model.dtype))
        return F.interpolate(depth.float(), size=pixels.shape[-2:], mode="bicubic", antialias=True)

    def _predict(self, pixels: Tensor) -> Tensor:
        patch = getattr(getattr(self.model.config, "backbone_config", None), "patch_size", 1)
        if min(pixels.shape[-2:]) < patch:
            raise FluxError(
                f"a picture of {pixels.shape[-1]}x{pixels.shape[-2]} is too small for this depth model: "
                f"use {patch} pixels or more on each side, or the method 'prepared'"
            )
        return self.model(pixels).predicted_depth[:, None]


def _stretched(depth: Tensor) -> Tensor:
    """From the least to the largest depth of one picture to 0..1; a flat one is all 0."""
    depth = depth.float()
    low, high = depth.min(), depth.max()
    return ((depth - low) / (high - low)).clamp(0, 1) if high > low else torch.zeros_like(depth)


def _auxiliary(model: torch.nn.Module) -> Any:
    """image_gen_aux's preprocessor around a model, or None where it is not installed or does not start."""
    try:
        from image_gen_aux import DepthPreprocessor
    except ImportError:
        return None
    except RuntimeError as error:  # it imports torchvision, which may not fit the torch that is here
        log.warning("image_gen_aux does not start (%s); transformers makes the same depth maps", error)
        return None
    return DepthPreprocessor(model)
