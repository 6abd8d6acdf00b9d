"""`@node`: a typed Python function becomes a ComfyUI node class, without importing ComfyUI.

    @node("Empty Canvas", category="latent", aliases=("blank",))
    def empty_canvas(
        width: Annotated[int, Range(16, 8192, 16), "Width of the picture, in pixels."] = 1024,
        latent: Annotated[LATENT | None, "An optional socket: the default is None."] = None,
    ) -> Annotated[LATENT, Output("latent"), "An empty latent."]:
        '''What the node does; shown in the canvas's node library.'''

The function stays an ordinary function; its class is `empty_canvas.node_class`, known as `FluxCanvas_EmptyCanvas`.
Everything about an input stands in its annotation: an edge or a plain type, the widget, and last the tooltip. A default
makes a widget's default. Several outputs are a `tuple[...]` of annotations, and the function returns a tuple.

Files store widget values by position. So the widgets of a published node are never renamed, moved or removed, and a
new one goes after the last, with `optional=True`; `tests/unit/nodes/node_signatures.json` holds every order, and the
suite fails when one changes in another way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ..flux_runtime.errors import FluxError
from .edges import Edge
from .widgets import Widget

PREFIX = "FluxCanvas_"
MISSING = inspect.Parameter.empty
HIDDEN = ("UNIQUE_ID", "PROMPT", "EXTRA_PNGINFO", "DYNPROMPT")


class DefinitionError(TypeError):
    """A node's definition is malformed: the pack must not load with it."""


@dataclass(frozen=True)
class Output:
    """An output's name on the canvas."""

    name: str


@dataclass(frozen=True)
class Hidden:
    """A value the host fills in by itself: the node's id, or the prompt and workflow being run."""

    kind: str


@dataclass(frozen=True)
class Input:
    """One parameter of a node's function, as read from its annotation."""

    name: str
    kind: type  # an Edge, or the plain type of a widget's value
    widget: Widget | None
    hidden: Hidden | None
    optional: bool
    tooltip: str
    default: Any = MISSING

    @property
    def group(self) -> str:
        """Which of the three groups of INPUT_TYPES it belongs to."""
        return "hidden" if self.hidden else "optional" if self.optional else "required"

    def declare(self) -> Any:
        """The input as INPUT_TYPES gives it."""
        if self.hidden:
            return self.hidden.kind
        kind, options = self.widget.declare(self.kind) if self.widget else (self.kind.__name__, {})
        if self.widget and self.default is not MISSING:
            options["default"] = self.default
        return kind, {**options, "tooltip": self.tooltip}

    def fault(self, value: Any) -> str:
        """What is wrong with a value the node was given, as the end of a sentence; "" when nothing is."""
        if self.hidden or (self.optional and value is None):
            return ""
        return self.widget.fault(value, self.kind) if self.widget else self.kind.fault(value)


@dataclass(frozen=True)
class Spec:
    """A whole node, read from its function."""

    name: str
    title: str
    category: str
    aliases: tuple[str, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str, str], ...]  # edge, name, tooltip
    several: bool  # the function returns a tuple
    function: Callable[..., Any]

    @property
    def id(self) -> str:
        return PREFIX + self.name

    def input_types(self) -> dict[str, dict[str, Any]]:
        """ComfyUI's INPUT_TYPES; choices are asked for their names now."""
        groups: dict[str, dict[str, Any]] = {"required": {}}
        for one in self.inputs:
            groups.setdefault(one.group, {})[one.name] = one.declare()
        return groups

    def call(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Run the function; a value out of its widget's range or of a wrong class is a `FluxError`."""
        for one in self.inputs:
            problem = one.name in values and one.fault(values[one.name])
            if problem:
                raise FluxError(f"{self.title}: the input {one.name!r} {problem}")
        result = self.function(**values)
        return (() if result is None else result) if self.several else (result,)


def node(
    title: str,
    *,
    category: str,
    name: str = "",
    aliases: Iterable[str] = (),
    output_node: bool = False,
    fingerprint: Callable[..., Any] | None = None,
    validate: Callable[..., bool | str] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a node; raises `DefinitionError` when the declaration is malformed.

    `name` is for one that the function's own does not spell (IPAdapter).
    `fingerprint(**inputs)` gives a value that changes when the node must run again although its inputs are the same.
    `validate(...)` names the inputs it judges (they skip the host's own checks; a linked one is None) and returns True
    or a sentence.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        spec = _read(function, name, title, f"FluxCanvas/{category}", tuple(aliases))
        function.node_class = _build(spec, output_node, fingerprint, validate)
        return function

    return declare


def mappings(functions: Iterable[Callable[..., Any]]) -> tuple[dict[str, type], dict[str, str]]:
    """NODE_CLASS_MAPPINGS and NODE_DISPLAY_NAME_MAPPINGS of these nodes; two of one id are a `DefinitionError`."""
    classes: dict[str, type] = {}
    for function in functions:
        spec = function.node_class.SPEC
        if spec.id in classes:
            raise DefinitionError(f"two nodes have the id {spec.id}: rename the function of one of them")
        classes[spec.id] = function.node_class
    return classes, {key: made.SPEC.title for key, made in classes.items()}


def _build(spec: Spec, output_node: bool, fingerprint: Any, validate: Any) -> type:
    """The V1 class; hosts read its attributes, make instances of it and call `run`."""
    members: dict[str, Any] = {
        "SPEC": spec,
        "CATEGORY": spec.category,
        "DESCRIPTION": inspect.getdoc(spec.function),
        "SEARCH_ALIASES": list(spec.aliases),
        "FUNCTION": "run",
        "RETURN_TYPES": tuple(edge for edge, _, _ in spec.outputs),
        "RETURN_NAMES": tuple(name for _, name, _ in spec.outputs),
        "OUTPUT_TOOLTIPS": tuple(tooltip for _, _, tooltip in spec.outputs),
        "OUTPUT_NODE": output_node,
        "INPUT_TYPES": classmethod(lambda cls: cls.SPEC.input_types()),
        "run": lambda self, **values: self.SPEC.call(values),
    }
    if fingerprint:
        members["IS_CHANGED"] = classmethod(lambda cls, **values: fingerprint(**values))
    if validate:
        members["VALIDATE_INPUTS"] = staticmethod(validate)  # hosts read its parameter names
    return type(spec.name, (), members)


def _read(function: Callable[..., Any], name: str, title: str, category: str, aliases: tuple[str, ...]) -> Spec:
    name = name or "".join(word.capitalize() for word in function.__name__.split("_"))
    where = f"node {PREFIX}{name}"
    if not inspect.getdoc(function):
        raise DefinitionError(f"{where} has no docstring: say there what it does")
    hints = _hints(function, where)
    parameters = inspect.signature(function).parameters.values()
    inputs = tuple(_input(p, hints, where) for p in parameters)
    outputs, several = _outputs(hints.get("return", MISSING), where)
    return Spec(name, title, category, aliases, inputs, outputs, several, function)


def _hints(function: Callable[..., Any], where: str) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise DefinitionError(f"{where} has an annotation that names nothing: {error}") from error


def _input(parameter: inspect.Parameter, hints: Mapping[str, Any], where: str) -> Input:
    where = f"{where}, input {parameter.name!r}:"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise DefinitionError(f"{where} a node takes no *args or **kwargs")
    if parameter.name not in hints:
        raise DefinitionError(f"{where} has no annotation")
    kind, nullable, notes = _unpack(hints[parameter.name])
    widget = next((n for n in notes if isinstance(n, Widget)), None)
    hidden = next((n for n in notes if isinstance(n, Hidden)), None)
    if hidden:
        return _hidden_input(parameter, hidden, kind, where)
    optional = widget.optional if widget else nullable
    made = Input(parameter.name, kind, widget, None, optional, _tooltip(notes, where), parameter.default)
    _check_socket(made, where) if widget is None else _check_widget(made, widget, where)
    return made


def _hidden_input(parameter: inspect.Parameter, hidden: Hidden, kind: type, where: str) -> Input:
    if hidden.kind not in HIDDEN:
        raise DefinitionError(f"{where} no host fills in {hidden.kind!r}; it may be one of {', '.join(HIDDEN)}")
    return Input(parameter.name, kind, None, hidden, True, "", parameter.default)


def _check_socket(made: Input, where: str) -> None:
    if not (isinstance(made.kind, type) and issubclass(made.kind, Edge)):
        raise DefinitionError(f"{where} {made.kind!r} is no edge, and a plain type needs a widget")
    if made.optional != (made.default is None):
        raise DefinitionError(f"{where} an optional socket is annotated `| None` and has the default None, or neither")


def _check_widget(made: Input, widget: Widget, where: str) -> None:
    problem = widget.malformed(made.kind)
    if not problem and made.default is not MISSING and (fault := widget.fault(made.default, made.kind)):
        problem = f"has a default that {fault}"
    if not problem and widget.optional and made.default is MISSING:
        problem = "is optional and has no default"
    if problem:
        raise DefinitionError(f"{where} {problem}")


def _outputs(hint: Any, where: str) -> tuple[tuple[tuple[str, str, str], ...], bool]:
    """The outputs as (edge, name, tooltip), and whether the function returns a tuple of them."""
    if hint is MISSING:
        raise DefinitionError(f"{where} does not say what it returns")
    several = get_origin(hint) is tuple
    hints = get_args(hint) if several else () if hint is type(None) else (hint,)
    return tuple(_output(one, f"{where}, output {i}:") for i, one in enumerate(hints)), several or not hints


def _output(hint: Any, where: str) -> tuple[str, str, str]:
    kind, _, notes = _unpack(hint)
    named = next((n for n in notes if isinstance(n, Output)), None)
    if not (isinstance(kind, type) and issubclass(kind, Edge)):
        raise DefinitionError(f"{where} {kind!r} is no edge")
    if named is None:
        raise DefinitionError(f"{where} has no name: annotate it with Output('...')")
    return kind.__name__, named.name, _tooltip(notes, where)


def _tooltip(notes: tuple[Any, ...], where: str) -> str:
    text = notes[-1] if notes and isinstance(notes[-1], str) else ""
    if not text.strip():
        raise DefinitionError(f"{where} has no tooltip: end its annotation with a sentence for the user")
    return text


def _unpack(hint: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """An annotation as (type, may it be None, notes)."""
    hint, outer = _without_none(hint)  # Python 3.10 adds `| None` around a parameter whose default is None
    notes = hint.__metadata__ if get_origin(hint) is Annotated else ()
    kind, inner = _without_none(hint.__origin__ if notes else hint)
    return kind, outer or inner, notes


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (Union, UnionType) or type(None) not in get_args(hint):
        return hint, False
    rest = [one for one in get_args(hint) if one is not type(None)]
    return (rest[0] if len(rest) == 1 else hint), True
