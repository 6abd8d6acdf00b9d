"""Who may talk to the server: only a browser page that the server itself sent, or a program on this machine.

A web page elsewhere can make a browser send requests to 127.0.0.1. Three checks stop that: the Host header must name
this server (against DNS rebinding), an Origin header must be the server's own (`null` is foreign), and requests that
the browser marks as cross-site are refused, WebSockets included.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from ...flux_runtime.errors import FluxError
from .files import DiskFull, PathError
from .options import HostOptions
from .replies import complaint

log = logging.getLogger("fluxcanvas")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?", re.ASCII)
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# Raw or multipart bodies, and settings, which the canvas sends without a content type.
_FREE_BODIES = ("/userdata/", "/upload/", "/settings")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
}


def host_name(host: str) -> str | None:
    """The name in a Host header without its port, in lower case; None when it is malformed."""
    match = _HOST.fullmatch(host)
    return match["name"].strip("[]").lower().rstrip(".") if match else None


class HostRule:
    """Which Host headers name this server."""

    def __init__(self, options: HostOptions) -> None:
        bound = options.host.strip("[]").lower()
        names = {host_name(name) or name.lower() for name in options.allowed_hosts}
        # Bound to other interfaces, the server is reached by address or by the machine's own name; a rebinding
        # attack needs a name of the attacker's, so addresses are safe.
        self.addresses = not is_loopback(bound)
        self.names = LOOPBACK | names | {bound} | ({socket.gethostname().lower()} if self.addresses else set())

    def allows(self, host: str) -> bool:
        name = host_name(host)
        return name is not None and (name in self.names or (self.addresses and _is_address(name)))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reached only from this machine."""
    return host in LOOPBACK or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _foreign(request: web.Request, rule: HostRule) -> str:
    """Why a request is refused, or an empty text."""
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or not rule.allows(hosts[0]):
        return (
            "The Host header does not name this server. Open the address that the server printed, or start it "
            "with --allow-host and this name."
        )
    for origin in request.headers.getall("Origin", []):
        if not _same_origin(origin, hosts[0]):
            return "The request comes from another website, which may not use this server."
    if request.headers.get("Sec-Fetch-Site", "").lower() == "cross-site":
        return "The request comes from another website; type this server's address into the browser instead."
    return ""


def _same_origin(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:  # brackets that hold no address
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _path(request: web.Request) -> str:
    """The path for the log, percent-encoded: the decoded one may hold codes that a terminal obeys."""
    return request.rel_url.raw_path[:200]


def _wrong_body(request: web.Request) -> bool:
    """Whether a browser posts a body that is not declared as JSON to a route that takes JSON."""
    if request.method in ("GET", "HEAD", "OPTIONS") or "Origin" not in request.headers or not request.body_exists:
        return False
    path = request.path.removeprefix("/api")
    return request.content_type != "application/json" and not path.startswith(_FREE_BODIES)


def gate(options: HostOptions) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """The middleware that lets only our own page and local programs in."""
    rule = HostRule(options)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        reason = _foreign(request, rule)
        if reason:
            log.warning("Refused %s %s from %s: %s", request.method, _path(request), request.remote, reason)
            return complaint(reason, status=403)
        if _wrong_body(request):
            return complaint("This route takes JSON: send it with Content-Type: application/json.", status=415)
        return await handler(request)

    return middleware


@web.middleware
async def sentences(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what a handler raises into a reply with one sentence, and go on serving."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400 or error.content_type == "application/json":
            raise
        return complaint(_http_sentence(request, error), status=error.status)
    except DiskFull as error:
        return complaint(str(error), status=507)
    except PathError as error:
        return complaint(str(error), status=403)
    except FluxError as error:
        return complaint(str(error), status=400)
    except ConnectionError:
        raise
    except OSError as error:
        log.exception("%s %s failed", request.method, _path(request))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return complaint(
            "No space is left on the disk; free some and try again."
            if full
            else f"The file system refused: {error.strerror or error}.",
            status=507 if full else 500,
        )
    except Exception as error:  # a fault of ours: told and logged, and the server goes on
        log.exception("%s %s failed", request.method, _path(request))
        return complaint(f"The server failed at this request ({type(error).__name__}); its log tells more.", status=500)


def _http_sentence(request: web.Request, error: web.HTTPException) -> str:
    if isinstance(error, web.HTTPNotFound) and error.text == "404: Not Found":
        return f"There is nothing at {request.path[:200]}."
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return "The request is too large for this server."
    return error.text if error.text and not error.text.startswith(str(error.status)) else f"{error.reason}."


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Headers for every reply: no guessing of types, no use by other sites."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.setdefault("Content-Security-Policy", "frame-ancestors 'none'")
