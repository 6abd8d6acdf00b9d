"""JSON in and out: replies that every browser can parse, request bodies that cannot hurt the server."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from aiohttp import web

from ...flux_runtime.errors import FluxError

MAX_DEPTH = 100
MAX_JSON_BYTES = 32 << 20


class BadRequest(FluxError):
    """A request body that is not what the route takes."""


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None and unknown objects as text: what JSON can say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def dumps(value: Any) -> str:
    """Strict JSON text: `JSON.parse` refuses the NaN that Python writes, so NaN becomes null."""
    try:
        return json.dumps(value, allow_nan=False, default=str)
    except (ValueError, TypeError):
        return json.dumps(_finite(value), default=str)


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON response."""
    return web.json_response(value, status=status, headers=headers, dumps=dumps)


def complaint(sentence: str, status: int = 400) -> web.Response:
    """An error response whose body is one sentence for the user."""
    return reply({"error": sentence}, status=status)


def _check_depth(value: Any) -> None:
    """Refuse nesting that would exhaust the stack of whoever walks the value later; walks without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise BadRequest(f"The JSON in the request is nested more than {MAX_DEPTH} levels deep.")


def parse_json(text: str | bytes) -> Any:
    """Parse a request's JSON; BadRequest with a sentence when it is none, too deep or not Unicode."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise BadRequest(f"The JSON in the request is nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError as error:  # malformed JSON, bytes that are no UTF-8, integers of thousands of digits
        raise BadRequest(f"The request's body is not valid JSON: {str(error)[:200]}.") from None
    _check_depth(value)
    return value


async def json_body(request: web.Request, empty: Any = None) -> Any:
    """The request's JSON body, or `empty` when there is none. At most 32 MiB; parsed off the event loop when large."""
    if (request.content_length or 0) > MAX_JSON_BYTES:
        raise web.HTTPRequestEntityTooLarge(max_size=MAX_JSON_BYTES, actual_size=request.content_length or 0)
    body = await request.read()
    if len(body) > MAX_JSON_BYTES:
        raise web.HTTPRequestEntityTooLarge(max_size=MAX_JSON_BYTES, actual_size=len(body))
    if not body.strip():
        return empty
    if len(body) < 1 << 16:
        return parse_json(body)
    return await asyncio.to_thread(parse_json, body)


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's JSON body, which must be an object (an empty body counts as one)."""
    value = await json_body(request, empty={})
    if not isinstance(value, dict):
        raise BadRequest(f"The request's body must be a JSON object, not {type(value).__name__}.")
    return value


def text_list(value: Any, name: str) -> list[str]:
    """A list of texts out of a request, or BadRequest naming the field."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRequest(f"{name!r} must be a list of texts.")
    return value


def whole_number(request: web.Request, name: str, default: int | None = None, least: int = 0) -> int | None:
    """An integer query parameter of at least `least`, or BadRequest naming it."""
    text = request.query.get(name, "")
    if text == "":
        return default
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least or number > 2**53:
        raise BadRequest(f"{name!r} must be a whole number of at least {least}, not {text[:40]!r}.")
    return number


def flag(request: web.Request, name: str, default: bool = False) -> bool:
    """A yes-or-no query parameter."""
    text = request.query.get(name)
    return default if text is None else text.lower() in ("true", "1", "yes")
