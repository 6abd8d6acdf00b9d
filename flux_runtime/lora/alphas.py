"""The alpha of layers that bring none along: PEFT's settings, in the file's metadata or in `adapter_config.json`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FluxError
from ..weights.files import read_json
from .flavours import checked_alpha

METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings, as `transformer.lora_alpha` and so on
PEFT_PREFIX = "base_model.model."
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_COMPONENTS = ("transformer.", "text_encoder.", "text_encoder_2.", "")


@dataclass(frozen=True)
class Settings:
    """What PEFT wrote of one component: alpha and rank, exceptions by the end of a layer's name, the kind of scale."""

    alpha: float
    exceptions: Mapping[str, float] = field(default_factory=dict)
    rank: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    root: bool = False  # alpha / sqrt(rank) instead of alpha / rank ("rsLoRA", Kalajdzievski, 2023)

    def of(self, layer: str, rank: int | None) -> float | None:
        """The alpha that, divided by the rank, gives the scale PEFT has; by 1 for matrices that show no rank."""
        alpha = _excepted(layer, self.exceptions, self.alpha)
        own = rank or _excepted(layer, self.ranks, self.rank)
        if own is None:
            return None
        scaled = alpha * math.sqrt(own) if self.root else alpha
        return scaled if rank else scaled / own


def _excepted(layer: str, exceptions: Mapping[str, float], usual: float | None) -> float | None:
    return next((value for end, value in exceptions.items() if layer == end or layer.endswith(f".{end}")), usual)


@dataclass(frozen=True)
class Alphas:
    """Settings by the prefix of the names they belong to."""

    settings: Mapping[str, Settings]

    def of(self, base: str, rank: int | None) -> float | None:
        """For a layer under the file's own name; None where nothing is said."""
        for prefix, settings in self.settings.items():
            if base.startswith(prefix):
                return settings.of(base.removeprefix(prefix), rank)
        return None


def read_alphas(path: Path, metadata: Mapping[str, str]) -> Alphas:
    """From the metadata of a file, or from the settings that PEFT lays beside its own files."""
    if METADATA in metadata:
        try:
            raw = json.loads(metadata[METADATA])
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise FluxError(f"its metadata {METADATA} is not a JSON object; save the LoRA again, or without it")
        found = {prefix: _settings(prefix, raw) for prefix in _COMPONENTS}
        return Alphas({prefix: settings for prefix, settings in found.items() if settings})
    config = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_FILE and config.is_file():
        settings = _settings("", read_json(config))
        return Alphas({PEFT_PREFIX: settings} if settings else {})
    return Alphas({})


def _settings(prefix: str, raw: Mapping[str, Any]) -> Settings | None:
    name = next((f"{prefix}{name}" for name in ("lora_alpha", "alpha") if f"{prefix}{name}" in raw), "")
    if raw.get(name) is None:
        return None
    rank = raw.get(f"{prefix}r")
    return Settings(
        _number(name, raw[name]),
        _exceptions(f"{prefix}alpha_pattern", raw, _number),
        None if rank is None else _rank(f"{prefix}r", rank),
        _exceptions(f"{prefix}rank_pattern", raw, _rank),
        raw.get(f"{prefix}use_rslora") is True,
    )


def _exceptions(name: str, raw: Mapping[str, Any], read: Callable[[str, Any], float]) -> dict[str, float]:
    table = raw.get(name) or {}
    if not isinstance(table, dict):
        raise FluxError(f"{name} in its settings is not a table; save the LoRA again")
    return {_ending(name, pattern): read(pattern, value) for pattern, value in table.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise FluxError(f"{name[:80]} in its settings is {str(value)[:40]!r}, not a number; save the LoRA again")
    return checked_alpha(f"{name[:80]} in its settings", float(value))


def _rank(name: str, value: Any) -> float:
    number = _number(name, value)
    if number < 0:
        raise FluxError(f"{name[:80]} in its settings is {number:g}, and a rank is above 0; save the LoRA again")
    return number


def _ending(name: str, pattern: str) -> str:
    """PEFT takes regular expressions and writes names; the expressions of strangers are not run."""
    plain = pattern.removeprefix("^").removesuffix("$").removeprefix(".*").lstrip(".").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", plain):
        raise FluxError(f"{name} {pattern[:80]!r} in its settings is no layer's name; save the LoRA again")
    return plain
