"""What a user may choose about the host, gathered in one immutable value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class HostOptions:
    """Options of `fluxcanvas serve`.

    `port` 0 takes a free port. `base_directory` None follows `folders.base_directory`. `cache_lru` keeps that many
    node results (0: only those of the last prompt) and `cache_none` keeps none. `allowed_hosts` are further names
    under which a browser may reach the server (a name in the local network, a reverse proxy).
    """

    host: str = "127.0.0.1"
    port: int = 8188
    models: tuple[Path, ...] = ()
    output: Path | None = None
    base_directory: Path | None = None
    open_browser: bool = True
    device: str | None = None
    extra_model_paths_config: tuple[Path, ...] = ()
    cache_lru: int = 0
    cache_none: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_upload_bytes: int = 100 * MIB
