"""What has run: the history, and the jobs API that shows queue and history as one list."""

from __future__ import annotations

from aiohttp import web

from ..context import Context, context
from ..jobs import STATUSES, all_jobs, duration, finished_detail, queued_detail
from ..replies import BadRequest, complaint, json_object, reply, text_list, whole_number

_SORTS = {"created_at": lambda job: job.get("create_time") or 0, "execution_duration": duration}


async def get_history(request: web.Request) -> web.Response:
    """The finished prompts: the newest `max_items`, or those from `offset` on."""
    most, offset = whole_number(request, "max_items"), whole_number(request, "offset", least=-1)
    return reply(context(request).queue.history(max_items=most, offset=offset))


async def get_history_of(request: web.Request) -> web.Response:
    """One finished prompt as `{id: entry}`; `{}` while it has not finished."""
    return reply(context(request).queue.history(prompt_id=request.match_info["prompt_id"]))


async def post_history(request: web.Request) -> web.Response:
    """Forget finished prompts: `{"clear": true}` all, `{"delete": [ids]}` some."""
    body, queue = await json_object(request), context(request).queue
    doomed = text_list(body.get("delete") or [], "delete")
    if body.get("clear"):
        queue.clear_history()
    for prompt_id in doomed:
        queue.delete_history(prompt_id)
    return web.Response()


def _choice(request: web.Request, name: str, choices: tuple[str, ...], default: str) -> str:
    value = request.query.get(name, default)
    if value not in choices:
        raise BadRequest(f"{name!r} must be one of {', '.join(choices)}, not {value[:40]!r}.")
    return value


def _statuses(request: web.Request) -> set[str]:
    wanted = {word.strip() for word in request.query.get("status", "").split(",") if word.strip()}
    unknown = wanted - set(STATUSES)
    if unknown:
        raise BadRequest(
            f"'status' must be one or more of {', '.join(STATUSES)}, not {', '.join(sorted(unknown))[:80]!r}."
        )
    return wanted or set(STATUSES)


async def get_jobs(request: web.Request) -> web.Response:
    """A page of the jobs, newest first unless `sort_by` and `sort_order` say otherwise."""
    statuses, queue = _statuses(request), context(request).queue
    limit, offset = whole_number(request, "limit", least=1), whole_number(request, "offset", 0) or 0
    sort = _choice(request, "sort_by", tuple(_SORTS), "created_at")
    ascending = _choice(request, "sort_order", ("asc", "desc"), "desc") == "asc"
    workflow = request.query.get("workflow_id")
    jobs = [
        job
        for job in all_jobs(queue.running(), queue.pending(), queue.history())
        if job["status"] in statuses and workflow in (None, job.get("workflow_id"))
    ]
    if sort != "created_at":
        jobs.sort(key=_SORTS[sort], reverse=True)
    if ascending:
        jobs.reverse()
    page = jobs[offset : offset + limit] if limit else jobs[offset:]
    more = offset + len(page) < len(jobs)
    return reply({"jobs": page, "pagination": {"offset": offset, "limit": limit, "total": len(jobs), "has_more": more}})


async def get_job(request: web.Request) -> web.Response:
    """One job with its workflow, and its outputs once it has finished."""
    prompt_id, queue = request.match_info["prompt_id"], context(request).queue
    for status, items in (("in_progress", queue.running()), ("pending", queue.pending())):
        for item in items:
            if item.prompt_id == prompt_id:
                return reply(queued_detail(item, status))
    finished = queue.history(prompt_id=prompt_id)
    if prompt_id in finished:
        return reply(finished_detail(prompt_id, finished[prompt_id]))
    return complaint("Job not found", status=404)


def _cancel(here: Context, prompt_id: str) -> None:
    """Take a job out of the queue or stop it; nothing happens to one that has ended, so cancelling twice is safe."""
    if not here.queue.delete(prompt_id):
        here.queue.interrupt(prompt_id)


async def cancel_job(request: web.Request) -> web.Response:
    """Cancel one job."""
    _cancel(context(request), request.match_info["prompt_id"])
    return reply({})


async def cancel_jobs(request: web.Request) -> web.Response:
    """Cancel the jobs in `{"job_ids": [...]}`."""
    body = await json_object(request)
    for prompt_id in text_list(body.get("job_ids"), "job_ids"):
        _cancel(context(request), prompt_id)
    return reply({})


API = [
    web.get("/history", get_history),
    web.post("/history", post_history),
    web.get("/history/{prompt_id}", get_history_of),
    web.get("/jobs", get_jobs),
    web.post("/jobs/cancel", cancel_jobs),
    web.get("/jobs/{prompt_id}", get_job),
    web.post("/jobs/{prompt_id}/cancel", cancel_job),
]
