"""The types of the edges between nodes: the canvas's name, the Python class that travels, and the node that makes it.

A node's signature names an edge (`model: Annotated[FLUX_MODEL, "..."]`). A type checker reads the Python class there;
at run time the name is a small marker, so that declaring a node imports neither torch nor the runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class Edge:
    """Base of the markers. Its name on the canvas is the class's own name."""

    holds: str = "object"  # the class name of the values
    maker: str = ""  # the title of the node that makes one, for messages

    @classmethod
    def fault(cls, value: Any) -> str:
        """What is wrong with a value that arrived on this edge, as the end of a sentence; "" when nothing is.

        Classes are compared by name: two copies of the pack in one ComfyUI may exchange values.
        """
        remedy = f"; connect it to {cls.maker}"
        if value is None:
            return f"came empty: the node before it has nothing to give{remedy}"
        if any(base.__name__ == cls.holds for base in type(value).__mro__):
            return ""
        return f"got a {type(value).__name__} where a {cls.holds} belongs{remedy}"


def _edge(name: str, holds: str, maker: str) -> type[Edge]:
    return type(name, (Edge,), {"holds": holds, "maker": maker, "__module__": __name__})


if TYPE_CHECKING:
    from torch import Tensor as IMAGE

    from ..flux_runtime.conditioning import Conditioning as FLUX_CONDITIONING
    from ..flux_runtime.flux import FluxModel as FLUX_MODEL
    from ..flux_runtime.text.encoders import TextEncoders as FLUX_TEXT
    from ..flux_runtime.vae import Vae as FLUX_VAE

    LATENT = dict[str, Any]
else:
    FLUX_MODEL = _edge("FLUX_MODEL", "FluxModel", "Load FLUX")
    FLUX_TEXT = _edge("FLUX_TEXT", "TextEncoders", "a Load FLUX that has text encoders, or Load FLUX Parts")
    FLUX_VAE = _edge("FLUX_VAE", "Vae", "a Load FLUX that has a VAE, or Load FLUX Parts")
    FLUX_CONDITIONING = _edge("FLUX_CONDITIONING", "Conditioning", "Encode Prompt")
    LATENT = _edge("LATENT", "dict", "Empty Canvas or Encode Image")  # {"samples": (B, 16, H/8, W/8), ...}
    IMAGE = _edge("IMAGE", "Tensor", "Load Image or Decode")  # (B, H, W, 3), 0..1
