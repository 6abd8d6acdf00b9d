"""What a loaded model is, in words."""

from __future__ import annotations

from typing import Annotated

from ..flux_runtime.errors import FluxError
from .edges import FLUX_MODEL, FLUX_TEXT, FLUX_VAE, STRING
from .host import current
from .schema import Output, node


@node("Model Report", category="model", aliases=("info", "inspect", "show model", "memory"), output_node=True)
def model_report(
    model: Annotated[FLUX_MODEL | None, "The model, from Load FLUX, Apply LoRA or Quantize."] = None,
    text: Annotated[FLUX_TEXT | None, "The text encoders, from the same."] = None,
    vae: Annotated[FLUX_VAE | None, "The VAE, from Load FLUX."] = None,
) -> Annotated[STRING, Output("report"), "The report as text."]:
    """Shows what a model is: variant, size, device, how its layers are stored, and the LoRAs on it."""
    from ..flux_runtime.model_report import model_report as report

    if model is None and text is None and vae is None:
        raise FluxError("Model Report has nothing to report on: connect a model, text encoders or a VAE")
    told = report(model, text, vae)
    current().text(told)
    return told
