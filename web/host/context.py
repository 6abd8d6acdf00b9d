"""What the routes work with, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from .events import WebSocketEvents
from .folders import Folders
from .logs import LogBuffer
from .options import HostOptions
from .packs import Packs
from .queue import PromptQueue
from .settings import Settings
from .userdata import UserData


@dataclass(frozen=True)
class Context:
    """The parts of one running host."""

    options: HostOptions
    folders: Folders
    packs: Packs
    events: WebSocketEvents
    queue: PromptQueue
    settings: Settings
    userdata: UserData
    logs: LogBuffer


CONTEXT: web.AppKey[Context] = web.AppKey("context", Context)


def context(request: web.Request) -> Context:
    """The host that a request came to."""
    return request.app[CONTEXT]
