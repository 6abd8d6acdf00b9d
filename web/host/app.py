"""The embedded host as an aiohttp application, and the command that serves it."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator

from aiohttp import web

from ...flux_runtime.errors import FluxError
from ...nodes import host as node_host
from . import examples, frontend
from .context import CONTEXT, Context
from .embedded import EmbeddedHost
from .events import WebSocketEvents
from .executor import Executor
from .folders import Folders
from .logs import LogBuffer
from .options import HostOptions
from .packs import OWN, load_packs
from .queue import Chore, PromptQueue, Worker
from .routes import route_table
from .security import add_headers, gate, is_loopback, sentences
from .settings import Settings
from .userdata import UserData

log = logging.getLogger("fluxcanvas")
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


def _context(options: HostOptions) -> Context:
    """Make the parts of the host: folders on disk, node packs, stores."""
    folders = Folders.from_options(options)
    folders.create()
    examples.provide_inputs(folders.input)
    events = WebSocketEvents(
        {
            "supports_preview_metadata": True,
            "supports_progress_text_metadata": True,
            "max_upload_size": options.max_upload_bytes,
        }
    )
    return Context(
        options,
        folders,
        load_packs(folders),
        events,
        PromptQueue(events),
        Settings(folders.user / "fluxcanvas.settings.json"),
        UserData(folders.user / "default"),
        LogBuffer(events.send),
    )


def _worker(here: Context) -> Worker:
    """The thread that executes, with our nodes' questions answered by the embedded host."""
    embedded = EmbeddedHost(here.folders, here.options.device)
    embedded.check_device()
    node_host.use(embedded)
    kind = "none" if here.options.cache_none else "lru" if here.options.cache_lru else "classic"
    executor = Executor(here.packs.nodes, here.events, kind, here.options.cache_lru)
    embedded.release = executor.free
    return Worker(here.queue, executor)


def build_app(options: HostOptions) -> web.Application:
    """The application: routes, guards, and a worker thread that starts and ends with it.

    FluxError when a folder, a model path file or the device is not usable.
    """
    here = _context(options)
    worker = _worker(here)
    app = web.Application(middlewares=[sentences, gate(options)], client_max_size=options.max_upload_bytes)
    app[CONTEXT] = here
    app.add_routes(route_table())
    app.on_response_prepare.append(add_headers)

    async def run(_: web.Application) -> AsyncIterator[None]:
        here.events.attach(asyncio.get_running_loop())
        root = logging.getLogger()
        root.addHandler(here.logs)
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)
        root.removeHandler(here.logs)
        here.folders.close()

    async def close_sockets(_: web.Application) -> None:
        await here.events.close()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(close_sockets)
    return app


def listen(options: HostOptions) -> socket.socket:
    """A bound socket; FluxError with the remedy when the address is taken or not this machine's."""
    host = options.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, options.port), family=family)
    except OSError as error:
        raise FluxError(_why_not(error, host, options.port)) from error


def _why_not(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} is in use, perhaps by another fluxcanvas or ComfyUI. Close that, or choose another "
            "port with --port (0 takes a free one)."
        )
    if error.errno == errno.EACCES:
        return f"Port {port} needs special rights; choose one above 1023 with --port."
    return f"The server cannot listen on {host}, port {port}: {error.strerror or error}. Check --host and --port."


def address(options: HostOptions, bound: socket.socket) -> str:
    """The address to open in a browser."""
    host = options.host.strip("[]")
    host = _WILDCARDS.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{bound.getsockname()[1]}/"


def _stop_event() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop.set)
        except NotImplementedError:  # Windows' event loop has no signal handlers of its own
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    return stop


def _open_browser(url: str) -> None:
    """Open the starter template. In a thread, because some browsers' launchers only return when they are closed."""
    start = f"{url}?template={examples.STARTER}&source={OWN}"
    threading.Thread(target=webbrowser.open, args=(start,), daemon=True).start()


async def _serve(app: web.Application, options: HostOptions, bound: socket.socket) -> None:
    stop = _stop_event()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=3)
    await runner.setup()
    try:
        await web.SockSite(runner, bound).start()
        url = address(options, bound)
        print(f"fluxcanvas is open at {url}  (Ctrl+C ends it)", flush=True)
        app[CONTEXT].queue.ask(Chore.WARM_UP)
        if options.open_browser:
            _open_browser(url)
        await stop.wait()
        print("Ending ...", flush=True)
    finally:
        await runner.cleanup()


def serve(options: HostOptions) -> int:
    """Serve the canvas until SIGINT or SIGTERM; the exit status. FluxError tells what keeps it from starting."""
    frontend.static_folder()  # raises what tells to install the canvas: now, not when the first page is asked for
    with listen(options) as bound:
        if not is_loopback(options.host.strip("[]").lower()):
            log.warning(
                "Listening on %s: whoever reaches this port can run workflows and see the pictures.", options.host
            )
        asyncio.run(_serve(build_app(options), options, bound))
    return 0
