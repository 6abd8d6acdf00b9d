"""The types of the edges between nodes: the canvas's name, the Python class that travels, and the node that makes it.

A node's signature names an edge (`model: Annotated[FLUX_MODEL, "..."]`). A type checker reads the Python class there;
at run time the name is a small marker, so that declaring a node imports neither torch nor the runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class Edge:
    """Base of the markers. Its name on the canvas is the class's own name."""

    holds: tuple[str, ...] = ("object",)  # the class names of the values
    maker: str = ""  # the title of the node that makes one, for messages

    @classmethod
    def fault(cls, value: Any) -> str:
        """What is wrong with a value that arrived on this edge, as the end of a sentence; "" when nothing is.

        Classes are compared by name: two copies of the pack in one ComfyUI may exchange values.
        """
        remedy = f"; connect it to {cls.maker}"
        if value is None:
            return f"came empty: the node before it has nothing to give{remedy}"
        if any(base.__name__ in cls.holds for base in type(value).__mro__):
            return ""
        return f"got a {type(value).__name__} where a {' or '.join(cls.holds)} belongs{remedy}"


def _edge(name: str, maker: str, *holds: str) -> type[Edge]:
    return type(name, (Edge,), {"holds": holds, "maker": maker, "__module__": __name__})


if TYPE_CHECKING:
    from torch import Tensor as IMAGE
    from torch import Tensor as MASK

    from ..flux_runtime.adapters import IPAdapter, Redux
    from ..flux_runtime.conditioning import Conditioning as FLUX_CONDITIONING
    from ..flux_runtime.crop import Stitch as FLUX_STITCH
    from ..flux_runtime.flux import FluxModel as FLUX_MODEL
    from ..flux_runtime.lora.stack import LoraStack as FLUX_LORA
    from ..flux_runtime.sidenets import ControlNet as FLUX_CONTROLNET
    from ..flux_runtime.text.encoders import TextEncoders as FLUX_TEXT
    from ..flux_runtime.vae import Vae as FLUX_VAE

    FLUX_ADAPTER = IPAdapter | Redux
    LATENT = dict[str, Any]
    LORA_STACK = list[tuple[str, float, float]]
    STRING = str
else:
    FLUX_MODEL = _edge("FLUX_MODEL", "Load FLUX", "FluxModel")
    FLUX_TEXT = _edge("FLUX_TEXT", "a Load FLUX that has text encoders, or Load FLUX Parts", "TextEncoders")
    FLUX_VAE = _edge("FLUX_VAE", "a Load FLUX that has a VAE, or Load FLUX Parts", "Vae")
    FLUX_CONDITIONING = _edge("FLUX_CONDITIONING", "Encode Prompt", "Conditioning")
    FLUX_CONTROLNET = _edge("FLUX_CONTROLNET", "Load ControlNet", "ControlNet")
    FLUX_ADAPTER = _edge("FLUX_ADAPTER", "Load Adapter", "IPAdapter", "Redux")
    FLUX_STITCH = _edge("FLUX_STITCH", "Crop for Inpaint", "Stitch")
    FLUX_LORA = _edge("FLUX_LORA", "Load LoRA or LoRA Stack", "LoraStack")
    LORA_STACK = _edge("LORA_STACK", "a LoRA stack of another node pack", "list", "tuple")  # of (file, weight, weight)
    LATENT = _edge("LATENT", "Empty Canvas or Encode Image", "dict")  # {"samples": (B, 16, H/8, W/8), ...}
    IMAGE = _edge("IMAGE", "Load Image or Decode", "Tensor")  # (B, H, W, 3), 0..1
    MASK = _edge("MASK", "Load Image (as Mask) or Mask Edit", "Tensor")  # (B, H, W), 0..1, 1 where to draw
    STRING = _edge("STRING", "a node that gives text", "str")
