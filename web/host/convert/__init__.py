"""A workflow as the canvas saves it (UI format) -> the prompt that a host executes (API format)."""

from .document import WorkflowError
from .node_types import widget_position
from .prompt import convert, is_prompt

__all__ = ["WorkflowError", "convert", "is_prompt", "widget_position"]
