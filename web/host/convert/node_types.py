"""What the canvas makes of a node's definition (its object_info entry): sockets, widgets, and the values they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NUMBERS = ("INT", "FLOAT")
WIDGET_DEFAULTS: dict[str, Any] = {
    "INT": 0,
    "FLOAT": 0,
    "BOOLEAN": False,
    "STRING": "",
    "MARKDOWN": "",
    "TEXTAREA": "",
    "COLOR": "#000000",
    "CURVE": None,
    "PAINTER": None,
    "GALLERIA": None,
}
UPLOADS = ("image_upload", "video_upload", "animated_image_upload")
LARGEST_UNSAID = 2048  # a number widget without a maximum ends there


@dataclass(frozen=True)
class Slot:
    """An input of a node: `widget` says whether it also has a widget."""

    name: str
    type: str
    widget: bool = False


@dataclass(frozen=True)
class Widget:
    """One entry of `widgets_values`. Those of the canvas alone, a seed's control or a button, are not `sent`."""

    name: str
    type: str
    options: Mapping[str, Any]
    default: Any
    sent: bool = True

    @property
    def choices(self) -> Sequence[Any]:
        """What a combo offers; empty for other widgets."""
        choices = self.options.get("options")
        return choices if self.type == "COMBO" and isinstance(choices, (list, tuple)) else ()


@dataclass(frozen=True)
class NodeType:
    """A node class: inputs in the order of the canvas (sockets before widgets), output types, widgets by position."""

    title: str
    slots: tuple[Slot, ...]
    outputs: tuple[str, ...]
    widgets: tuple[Widget, ...]
    forced: tuple[bool, ...]  # per value that a file from before 2025 holds: whether a forced input's, to be dropped


def node_type(name: str, info: Mapping[str, Any]) -> NodeType:
    """Read an object_info entry."""
    sockets: list[Slot] = []
    with_widgets: list[Slot] = []
    widgets: list[Widget] = []
    forced: list[bool] = []
    uploads = False
    for input_name, kind, options in _declared(info):
        slot, widget = _slot(input_name, kind, options)
        uploads = uploads or any(options.get(key) for key in UPLOADS)
        if widget:
            widgets += [widget, *_companions(widget)]
        (with_widgets if widget else sockets).append(slot)
        if widget or options.get("forceInput"):
            forced += [bool(options.get("forceInput"))] + [False] * bool(options.get("control_after_generate"))
    if uploads:
        widgets.append(Widget("upload", "BUTTON", {}, "image", sent=False))
    outputs = tuple(kind if isinstance(kind, str) else "COMBO" for kind in info.get("output", ()))
    title = str(info.get("display_name") or name)
    return NodeType(title, (*sockets, *with_widgets), outputs, tuple(widgets), tuple(forced))


def _declared(info: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The visible inputs in the order of the canvas."""
    groups, order = info.get("input", {}), info.get("input_order", {})
    for group in ("required", "optional"):
        entries = groups.get(group) or {}
        for name in [*order.get(group, ()), *(name for name in entries if name not in order.get(group, ()))]:
            if name in entries:
                spec = entries[name]
                yield name, spec[0], spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}


def _slot(name: str, kind: Any, options: Mapping[str, Any]) -> tuple[Slot, Widget | None]:
    if not isinstance(kind, str):  # a combo in its old form: the list of choices stands for the type
        kind, options = "COMBO", {**options, "options": list(kind)}
    drawn = str(options.get("widgetType", kind))
    if options.get("forceInput") or (drawn != "COMBO" and drawn not in WIDGET_DEFAULTS):
        return Slot(name, kind), None
    return Slot(name, kind, widget=True), Widget(name, drawn, options, _default(drawn, options))


def _default(kind: str, options: Mapping[str, Any]) -> Any:
    if options.get("default") is not None:
        return options["default"]
    if kind != "COMBO":
        return WIDGET_DEFAULTS[kind]
    if options.get("multi_select"):
        return []
    return next(iter(options.get("options") or ()), None)


def _companions(widget: Widget) -> list[Widget]:
    """The widgets that the canvas puts behind one: what happens to a seed after a run, a remote list's buttons."""
    if widget.options.get("remote"):
        return [
            Widget("refresh_after_run", "BOOLEAN", {}, False, sent=False),
            Widget("refresh", "BUTTON", {}, "refresh", sent=False),
        ]
    seed = widget.type == "INT" and widget.name in ("seed", "noise_seed")
    if widget.type not in ("INT", "COMBO") or not widget.options.get("control_after_generate", seed):
        return []
    control = Widget("control_after_generate", "COMBO", {}, "randomize", sent=False)
    return [control] if widget.type == "INT" else [control, Widget("control_filter_list", "STRING", {}, "", sent=False)]


def widget_values(kind: NodeType, saved: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a node's sent widgets by name, from `widgets_values` as saved; what is not there has its default.

    `saved` is a list by position, or a dict by name as some packs save it; `named` counts where it is missing.
    """
    if isinstance(saved, Mapping) or not isinstance(saved, list):
        by_name = saved if isinstance(saved, Mapping) else named
        return {widget.name: by_name.get(widget.name, widget.default) for widget in kind.widgets if widget.sent}
    if any(kind.forced) and len(saved) == len(kind.forced):
        saved = [value for value, dropped in zip(saved, kind.forced, strict=True) if not dropped]
    return {
        widget.name: saved[index] if index < len(saved) else widget.default
        for index, widget in enumerate(kind.widgets)
        if widget.sent
    }


def fit_number(widget: Widget, value: Any) -> Any:
    """A number as a widget takes it from a primitive: within its limits and on its steps; else the value itself."""
    if widget.type not in NUMBERS:
        return value
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        return value
    if not math.isfinite(number):
        return value
    options = widget.options
    low, high = options.get("min", 0), options.get("max", LARGEST_UNSAID)
    if widget.type == "INT":
        return _on_steps(int(value) if isinstance(value, int) else number, low, high, options.get("step") or 1)
    step = options.get("step") or 0.5
    digits = max(0, -math.floor(math.log10(step)))
    return min(max(math.floor(number * 10**digits + 0.5) / 10**digits, low), high)


def _on_steps(number: int | float, low: int, high: int, step: int) -> int:
    """The nearest whole number of steps from the lowest value's remainder, within the limits."""
    if isinstance(number, float) or step != 1:
        shift = low % step
        number = math.floor((number - shift) / step + 0.5) * step + shift
    return min(max(int(number), low), high)


def widget_position(info: Mapping[str, Any], name: str) -> int | None:
    """Where a widget's value stands in `widgets_values`; None when the input has no widget."""
    widgets = node_type("", info).widgets
    return next((index for index, widget in enumerate(widgets) if widget.sent and widget.name == name), None)
