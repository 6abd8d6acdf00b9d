"""A real server on a free port, in a folder of its own, with a pack of small nodes."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest
from aiohttp import web
from PIL import Image

TOYS = """
import time, torch
from PIL import Image
from fluxcanvas.nodes import host

class ToyImage:
    CATEGORY, RETURN_TYPES, FUNCTION = "toys", ("IMAGE",), "make"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"red": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0}),
                             "size": ("INT", {"default": 16, "min": 1, "max": 64}),
                             "text": ("STRING", {"default": ""})}}
    def make(self, red, size, text):
        here = host.current()
        for step in range(3):
            here.progress(step + 1, 3, Image.new("RGB", (8, 8), "blue"))
        here.text("made it")
        image = torch.zeros(1, size, size, 3)
        image[..., 0] = red
        return (image,)

class ToyWait:
    CATEGORY, RETURN_TYPES, FUNCTION = "toys", ("IMAGE",), "wait"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "seed": ("INT", {"default": 0})}}
    def wait(self, image, seed):
        for _ in range(3000):
            host.current().check_interrupt()
            time.sleep(0.01)
        return (image,)

class ToyFail:
    CATEGORY, RETURN_TYPES, FUNCTION = "toys", ("IMAGE",), "fail"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}
    def fail(self, image):
        raise RuntimeError("broken on purpose")

NODE_CLASS_MAPPINGS = {"ToyImage": ToyImage, "ToyWait": ToyWait, "ToyFail": ToyFail}
NODE_DISPLAY_NAME_MAPPINGS = {"ToyImage": "Toy Image"}
WEB_DIRECTORY = "./js"
"""


@dataclass
class Reply:
    """What the server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """The running server, and requests to it exactly as given: no path is normalised, no header added but Host."""

    def __init__(self, app: web.Application, port: int, base: Path) -> None:
        self.app, self.port, self.base = app, port, base

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def context(self) -> Any:
        from fluxcanvas.web.host.context import CONTEXT

        return self.app[CONTEXT]

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {"Host": self.host, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        reply = Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return reply

    def get(self, path: str, **query: Any) -> Reply:
        return self.request("GET", path + (f"?{urlencode(query)}" if query else ""))

    def post(self, path: str, value: Any = None, **headers: str) -> Reply:
        body = b"" if value is None else json.dumps(value).encode()
        return self.request("POST", path, body, **{"Content-Type": "application/json", **headers})

    def upload(self, path: str, name: str, data: bytes, **fields: str) -> Reply:
        boundary = "toyboundary"
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        ]
        parts += [
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n".encode(),
            data,
            f"\r\n--{boundary}--\r\n".encode(),
        ]
        return self.request(
            "POST", path, b"".join(parts), **{"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )

    def listen(
        self,
        prompt: dict[str, Any],
        *,
        client: str = "me",
        flags: dict[str, Any] | None = None,
        until: str = "executing",
    ) -> tuple[list[Any], Reply]:
        """Connect a WebSocket, submit a prompt, and gather what comes until its end (`executing` with node null)."""
        return asyncio.run(self._listen(prompt, client, flags, until))

    async def _listen(
        self, prompt: dict[str, Any], client: str, flags: dict[str, Any] | None, until: str
    ) -> tuple[list[Any], Reply]:
        got: list[Any] = []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{self.host}/ws?clientId={client}") as ws,
        ):
            got.append(await ws.receive_json(timeout=20))
            if flags is not None:
                await ws.send_json({"type": "feature_flags", "data": flags})
                got.append(await ws.receive_json(timeout=20))
            reply = await asyncio.to_thread(self.post, "/prompt", {"prompt": prompt, "client_id": client})
            while reply.status == 200:
                message = await ws.receive(timeout=30)
                got.append(json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else message.data)
                last = got[-1]
                if isinstance(last, dict) and last["type"] == until and last["data"].get("node") is None:
                    break
        return got, reply


@contextmanager
def running(base: Path, **options: Any) -> Iterator[Server]:
    """Serve in a thread; everything is ended and joined at the end."""
    from fluxcanvas.web.host.app import build_app
    from fluxcanvas.web.host.options import HostOptions

    app = build_app(HostOptions(base_directory=base, open_browser=False, device="cpu", **options))
    loop, ready, port = asyncio.new_event_loop(), threading.Event(), [0]
    runner = web.AppRunner(app, shutdown_timeout=1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port[0] = runner.addresses[0][1]
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(30)
    try:
        yield Server(app, port[0], base)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
        assert not thread.is_alive()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base directory with the toy pack."""
    pack = tmp_path / "base" / "custom_nodes" / "toys.v1"
    (pack / "js").mkdir(parents=True)
    (pack / "__init__.py").write_text(TOYS)
    (pack / "js" / "toys.js").write_text("export {};")
    return tmp_path / "base"


@pytest.fixture
def serve():
    """`with serve(base, **options) as server:` for tests that need options or several servers."""
    return running


@pytest.fixture
def server(base: Path) -> Iterator[Server]:
    """A running server with the toy pack."""
    with running(base) as one:
        yield one


@pytest.fixture
def png():
    """PNG bytes of one colour."""

    def make(color: Any = "red", size: tuple[int, int] = (8, 6), mode: str = "RGB") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, color).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def graph():
    """A prompt: a toy image, through some toy nodes, into PreviewImage or SaveImage."""

    def make(*through: str, end: str = "PreviewImage", **inputs: Any) -> dict[str, Any]:
        prompt: dict[str, Any] = {
            "1": {"class_type": "ToyImage", "inputs": {"red": 0.5, "size": 16, "text": "", **inputs}}
        }
        last = "1"
        for name in through:
            following = str(int(last) + 1)
            prompt[following] = {
                "class_type": name,
                "inputs": {"image": [last, 0], **({"seed": 0} if name == "ToyWait" else {})},
            }
            last = following
        prompt["9"] = {
            "class_type": end,
            "inputs": {"images": [last, 0], **({"filename_prefix": "toy"} if end == "SaveImage" else {})},
        }
        return prompt

    return make
