"""Weights in files: reading, naming, loading, reporting."""

from .inspect import inspect
from .load import load_flux, load_parts
from .report import PartReport, Report

__all__ = ["PartReport", "Report", "inspect", "load_flux", "load_parts"]
