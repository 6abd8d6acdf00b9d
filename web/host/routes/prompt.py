"""Submitting prompts, and steering the queue."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from ....flux_runtime.errors import FluxError
from ..context import Context, context
from ..replies import BadRequest, json_object, reply, text_list
from ..validate import validate_prompt

# A text this long in one widget is a mistake (a pasted file), and every copy of the prompt would carry it.
MAX_TEXT = 4 << 20


def refusal(kind: str, message: str, details: str = "", node_errors: Any = None) -> web.Response:
    """The 400 reply in the form that the canvas shows."""
    error = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return reply({"error": error, "node_errors": node_errors or {}}, status=400)


def _optional_text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= 200):
        raise BadRequest(f"{name!r} must be a text of at most 200 characters.")
    return value or None


def _extra_data(body: Mapping[str, Any], client_id: str | None) -> dict[str, Any]:
    extra = body.get("extra_data")
    if extra is not None and not isinstance(extra, dict):
        raise BadRequest("'extra_data' must be an object.")
    if not isinstance((extra or {}).get("extra_pnginfo") or {}, dict):
        raise BadRequest("'extra_pnginfo' in 'extra_data' must be an object: name -> what pictures carry under it.")
    extra = {**(extra or {}), "create_time": time.time_ns() // 1_000_000}
    return {**extra, "client_id": client_id} if client_id else extra


def _number(body: Mapping[str, Any]) -> float | None:
    value = body.get("number")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 2**53:  # NaN compares false
        raise BadRequest("'number' must be a number: the place in the queue, lower is sooner.")
    return float(value)


def _check_texts(prompt: Any) -> None:
    """Refuse absurdly long texts, naming the node and the input."""
    for node_id, node in prompt.items() if isinstance(prompt, dict) else ():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        for name, value in inputs.items() if isinstance(inputs, dict) else ():
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise BadRequest(
                    f"The text in {name!r} of node {node_id} ({node.get('class_type')}) has {len(value)} "
                    f"characters; at most {MAX_TEXT} are taken. Shorten it."
                )


async def _submit(here: Context, body: dict[str, Any]) -> web.Response:
    if body.get("prompt") is None:
        return refusal("no_prompt", "No prompt provided", "No prompt provided")
    prompt, targets = body["prompt"], body.get("partial_execution_targets")
    client_id, prompt_id = _optional_text(body, "client_id"), _optional_text(body, "prompt_id")
    if targets is not None:
        text_list(targets, "partial_execution_targets")
    number, extra = _number(body), _extra_data(body, client_id)
    _check_texts(prompt)
    result = await asyncio.to_thread(validate_prompt, prompt, here.packs.nodes, targets)
    if result.error is not None:
        return reply({"error": result.error, "node_errors": result.node_errors}, status=400)
    prompt_id = prompt_id or str(uuid.uuid4())
    placed = here.queue.put(
        prompt_id, prompt, extra, result.outputs, client_id, number=number, front=body.get("front") is True
    )
    return reply({"prompt_id": prompt_id, "number": placed, "node_errors": result.node_errors})


async def post_prompt(request: web.Request) -> web.Response:
    """Check a prompt and queue it: 200 with its id, or 400 with what is wrong where."""
    try:
        return await _submit(context(request), await json_object(request))
    except FluxError as error:
        return refusal("invalid_prompt", str(error))


async def get_prompt(request: web.Request) -> web.Response:
    """How many prompts wait or run."""
    return reply({"exec_info": {"queue_remaining": context(request).queue.remaining()}})


async def get_queue(request: web.Request) -> web.Response:
    """The running and the waiting prompts."""
    queue = context(request).queue
    return reply(
        {
            "queue_running": [item.as_list() for item in queue.running()],
            "queue_pending": [item.as_list() for item in queue.pending()],
        }
    )


async def post_queue(request: web.Request) -> web.Response:
    """Remove waiting prompts: `{"clear": true}` all, `{"delete": [ids]}` some."""
    body, queue = await json_object(request), context(request).queue
    doomed = text_list(body.get("delete") or [], "delete")
    if body.get("clear"):
        queue.clear()
    for prompt_id in doomed:
        queue.delete(prompt_id)
    return web.Response()


async def post_interrupt(request: web.Request) -> web.Response:
    """Stop what runs, or only the named prompt if that is what runs."""
    body = await json_object(request)
    context(request).queue.interrupt(_optional_text(body, "prompt_id"))
    return web.Response()


async def post_free(request: web.Request) -> web.Response:
    """Give memory back after the running prompt: `unload_models` the models, `free_memory` the cached results too."""
    body = await json_object(request)
    context(request).queue.free(bool(body.get("unload_models")), bool(body.get("free_memory")))
    return web.Response()


API = [
    web.get("/prompt", get_prompt),
    web.post("/prompt", post_prompt),
    web.get("/queue", get_queue),
    web.post("/queue", post_queue),
    web.post("/interrupt", post_interrupt),
    web.post("/free", post_free),
]
