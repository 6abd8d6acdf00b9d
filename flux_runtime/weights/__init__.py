"""Weights in files: reading, naming, loading, reporting."""

from .additions import load_adapter, load_controlnet, load_image_encoder
from .inspect import inspect
from .load import load_flux, load_parts
from .report import PartReport, Report

__all__ = [
    "PartReport",
    "Report",
    "inspect",
    "load_adapter",
    "load_controlnet",
    "load_flux",
    "load_image_encoder",
    "load_parts",
]
