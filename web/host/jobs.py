"""The queue and the history as the canvas's jobs API tells them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .queue import QueueItem

STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
_MEDIA = ("images", "video", "gifs", "audio", "3d")


def _without_none(job: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in job.items() if value is not None}


def _workflow_id(extra_data: Mapping[str, Any]) -> str | None:
    info = extra_data.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, Mapping) else None
    found = workflow.get("id") if isinstance(workflow, Mapping) else None
    return found if isinstance(found, str) else None


def queued_job(item: QueueItem, status: str) -> dict[str, Any]:
    """A waiting ("pending") or running ("in_progress") prompt as a job."""
    return _without_none(
        {
            "id": item.prompt_id,
            "status": status,
            "priority": item.number,
            "create_time": item.create_time,
            "outputs_count": 0,
            "workflow_id": _workflow_id(item.extra_data),
        }
    )


def _media(outputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every file that the outputs name, with its node and kind."""
    return [
        {**entry, "nodeId": node_id, "mediaType": kind}
        for node_id, output in outputs.items()
        for kind in _MEDIA
        for entry in output.get(kind) or ()
        if isinstance(entry, Mapping) and "filename" in entry
    ]


def _messages(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Event name -> its data; each of those asked for occurs once in a prompt."""
    return {name: data for name, data in entry["status"].get("messages", ())}


def _outcome(entry: Mapping[str, Any], messages: Mapping[str, Any]) -> str:
    if entry["status"].get("status_str") == "success":
        return "completed"
    return "cancelled" if "execution_interrupted" in messages else "failed"


def finished_job(prompt_id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A history entry as a job of the list. The preview is the last saved file, else the last temporary one."""
    number, _, _, extra_data = entry["prompt"][:4]
    messages = _messages(entry)
    ends = (messages.get(f"execution_{name}") for name in ("success", "error", "interrupted"))
    end = next((data for data in ends if data), {})
    media = _media(entry["outputs"])
    saved = [one for one in media if one.get("type") == "output"]
    return _without_none(
        {
            "id": prompt_id,
            "status": _outcome(entry, messages),
            "priority": number,
            "create_time": extra_data.get("create_time"),
            "execution_start_time": messages.get("execution_start", {}).get("timestamp"),
            "execution_end_time": end.get("timestamp"),
            "execution_error": messages.get("execution_error"),
            "outputs_count": len(media),
            "preview_output": (saved or media or [None])[-1],
            "workflow_id": _workflow_id(extra_data),
        }
    )


def finished_detail(prompt_id: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A finished job with its outputs, its course and the workflow that the canvas can open again."""
    return {
        **finished_job(prompt_id, entry),
        "outputs": entry["outputs"],
        "execution_status": entry["status"],
        "execution_meta": entry.get("meta", {}),
        "workflow": {"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]},
    }


def queued_detail(item: QueueItem, status: str) -> dict[str, Any]:
    """A waiting or running job with its workflow."""
    return {**queued_job(item, status), "workflow": {"prompt": item.prompt, "extra_data": item.extra_data}}


def all_jobs(
    running: Iterable[QueueItem], pending: Iterable[QueueItem], history: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every job, newest first."""
    jobs = [finished_job(prompt_id, entry) for prompt_id, entry in history.items()]
    jobs += [queued_job(item, "in_progress") for item in running]
    jobs += [queued_job(item, "pending") for item in pending]
    return sorted(reversed(jobs), key=lambda job: job.get("create_time") or 0, reverse=True)


def duration(job: Mapping[str, Any]) -> float:
    """How long a job ran, in milliseconds; 0 when it has not ended."""
    return (
        (job.get("execution_end_time") or 0) - (job.get("execution_start_time") or 0)
        if "execution_end_time" in job
        else 0
    )
