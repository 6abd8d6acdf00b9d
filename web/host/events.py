"""Events over WebSockets: the form of `protocols.Events` that the canvas and API clients listen to."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web
from PIL import Image

from .replies import dumps

log = logging.getLogger("fluxcanvas")
PREVIEW_IMAGE, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4
JPEG = 1
PREVIEW_SIZE = 512
_PREVIEW_FLAG = "supports_preview_metadata"
# A client that does not read (a sleeping tab) must not fill the memory: beyond the first number of waiting messages
# previews are dropped for it, beyond the second it is disconnected and will ask again for everything.
_BACKLOG_PREVIEWS, _BACKLOG = 32, 5000


@dataclass
class _Client:
    """A connected browser: its outgoing messages, and what it declared that it understands."""

    socket: web.WebSocketResponse
    flags: Mapping[str, Any] = field(default_factory=dict)
    outbox: asyncio.Queue[str | bytes | None] = field(default_factory=asyncio.Queue)

    def put(self, message: str | bytes, preview: bool = False) -> None:
        waiting = self.outbox.qsize()
        if waiting >= _BACKLOG:
            self.outbox = asyncio.Queue()
            self.outbox.put_nowait(None)
        elif waiting < _BACKLOG_PREVIEWS or not preview:
            self.outbox.put_nowait(message)


def preview_bytes(image: Image.Image) -> bytes:
    """JPEG of at most 512 pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def preview_frame(jpeg: bytes, metadata: Mapping[str, Any] | None) -> bytes:
    """Binary type 4 with its metadata; without metadata type 1, for clients that do not know type 4."""
    if metadata is None:
        return struct.pack(">II", PREVIEW_IMAGE, JPEG) + jpeg
    header = dumps({**metadata, "image_type": "image/jpeg"}).encode()
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(header)) + header + jpeg


def text_frame(text: str, node_id: str, prompt_id: str | None) -> bytes:
    """Binary type 3; the prompt id goes first for clients that understand `supports_progress_text_metadata`."""
    # half an emoji must not fail the node
    *ids, line = (part.encode("utf-8", "replace") for part in (prompt_id, node_id, text) if part is not None)
    return struct.pack(">I", TEXT) + b"".join(struct.pack(">I", len(one)) + one for one in ids) + line


class WebSocketEvents:
    """Events over the WebSockets at /ws, one client per clientId."""

    def __init__(self, features: Mapping[str, Any]) -> None:
        """`features` are the server's flags, told to each client in answer to its own."""
        self.features = dict(features)
        self.status: dict[str, Any] = {"status": {"exec_info": {"queue_remaining": 0}}}
        self._clients: dict[str, _Client] = {}
        self._executing: dict[str, dict[str, Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the loop that serves the sockets; events sent before are dropped, since nobody is connected."""
        self._loop = loop

    # Sending, from any thread

    def send(self, type: str, data: dict[str, Any], client_id: str | None) -> None:
        text = dumps({"type": type, "data": data})
        self._on_loop(self._send_text_message, type, data, text, client_id)

    def send_preview(self, image: Image.Image, metadata: dict[str, Any], client_id: str | None) -> None:
        if not self._clients_for(client_id):  # nobody looks: spare the encoding
            return
        jpeg = preview_bytes(image)
        rich, plain = preview_frame(jpeg, metadata), preview_frame(jpeg, None)
        self._on_loop(self._send_frames, client_id, _PREVIEW_FLAG, rich, plain)

    def send_text(self, text: str, node_id: str, prompt_id: str, client_id: str | None) -> None:
        rich, plain = text_frame(text, node_id, prompt_id), text_frame(text, node_id, None)
        self._on_loop(self._send_frames, client_id, "supports_progress_text_metadata", rich, plain)

    def _on_loop(self, call: Any, *arguments: Any) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop closed between the two lines: the server is ending
            log.debug("An event came after the end of the server")

    # On the loop

    def _clients_for(self, client_id: str | None) -> list[_Client]:
        if client_id is None:
            return list(self._clients.values())
        client = self._clients.get(client_id)
        return [client] if client else []

    def _send_text_message(self, type: str, data: dict[str, Any], text: str, client_id: str | None) -> None:
        if type == "status":
            self.status = data
        elif type == "executing" and client_id is not None:
            self._remember(client_id, data)
        for client in self._clients_for(client_id):
            client.put(text)

    def _remember(self, client_id: str, data: dict[str, Any]) -> None:
        """Keep what runs for a client, so that a reloaded page shows it."""
        if data.get("node") is None:
            self._executing.pop(client_id, None)
        else:
            self._executing[client_id] = data

    def _send_frames(self, client_id: str | None, wanted: str, rich: bytes, plain: bytes) -> None:
        for client in self._clients_for(client_id):
            client.put(rich if client.flags.get(wanted) else plain, preview=wanted == _PREVIEW_FLAG)

    def connected(self) -> list[str]:
        """The ids of the connected clients."""
        return list(self._clients)

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        """Serve one WebSocket until it closes. A second one with the same clientId takes the first one's place."""
        socket = web.WebSocketResponse(max_msg_size=1 << 20, heartbeat=30)
        await socket.prepare(request)
        client_id = request.query.get("clientId", "")[:200] or uuid.uuid4().hex
        client = _Client(socket)
        self._clients[client_id] = client
        client.put(dumps({"type": "status", "data": {**self.status, "sid": client_id}}))
        if client_id in self._executing:
            client.put(dumps({"type": "executing", "data": self._executing[client_id]}))
        writer = asyncio.create_task(self._write(client))
        try:
            await self._read(client)
        finally:
            writer.cancel()
            if self._clients.get(client_id) is client:
                del self._clients[client_id]
        return socket

    async def _write(self, client: _Client) -> None:
        while True:
            message = await client.outbox.get()
            if message is None:
                await client.socket.close(message=b"too slow")
                return
            try:
                if isinstance(message, str):
                    await client.socket.send_str(message)
                else:
                    await client.socket.send_bytes(message)
            except ConnectionError:  # the client went away; the reading side ends the connection
                return

    async def _read(self, client: _Client) -> None:
        async for message in client.socket:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                value = json.loads(message.data)
            except (ValueError, RecursionError):
                log.warning("A client sent a WebSocket message that is not JSON; it is ignored")
                continue
            if isinstance(value, dict) and value.get("type") == "feature_flags":
                client.flags = value["data"] if isinstance(value.get("data"), dict) else {}
                client.put(dumps({"type": "feature_flags", "data": self.features}))

    async def close(self) -> None:
        """Close every socket, all at once: each waits some seconds for a client that has gone to sleep."""
        clients = list(self._clients.values())
        await asyncio.gather(*(client.socket.close(message=b"the server is ending") for client in clients))
        self._clients.clear()
