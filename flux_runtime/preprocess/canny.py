"""Edges, for the models that draw along them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import FluxError
from ..image import to_pil


def canny(images: Tensor, low: float = 50, high: float = 200) -> Tensor:
    """(B, H, W, 3) in 0..1 -> their edges as OpenCV finds them, (B, H, W, 3) of 0 and 1.

    An edge begins where the gradient of the 8-bit picture is steeper than `high` and goes on while it is steeper than
    `low`. The defaults are those that FLUX.1 Canny is used with.
    """
    if not 0 <= low <= high:
        raise FluxError(f"Canny's thresholds must satisfy 0 <= low <= high; got low {low:g} and high {high:g}")
    try:
        import cv2
    except ImportError as error:
        raise FluxError("Canny needs OpenCV: install it with `pip install fluxcanvas[preprocess]`") from error
    edges = [cv2.Canny(np.asarray(picture), low, high) for picture in to_pil(images[..., :3])]
    return torch.from_numpy(np.stack(edges)).float().div(255)[..., None].repeat(1, 1, 1, 3)
