"""The checks of one node's inputs: what is missing, what is linked wrongly, what a widget does not take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

from .blocker import is_blocker
from .graph import Graph, is_link
from .inputs import Inputs
from .mapping import call_each
from .protocols import Prompt
from .spec import InputSpec, NodeSpec, Specs, coerce, short, unwrap

Problem = dict[str, Any]  # {"type", "message", "details", "extra_info"}
CHOICES_SHOWN = 20


def problem(kind: str, message: str, details: str = "", **extra_info: Any) -> Problem:
    """A problem in the shape that the canvas reads."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def fits(received: Any, wanted: Any) -> bool:
    """Whether an output's type may be linked to an input's: types are names, unions of names, or lists of choices."""
    if (received != wanted) is False or "*" in (received, wanted):  # not "==": packs have any-types that never differ
        return True
    if isinstance(received, str) and isinstance(wanted, str):
        return not _names(received).isdisjoint(_names(wanted))
    return "COMBO" in (received, wanted)


def _names(union: str) -> set[str]:
    return {name.strip() for name in union.split(",")}


class InputChecker:
    """Checks the inputs of the nodes of one prompt."""

    def __init__(self, prompt: Prompt, specs: Specs) -> None:
        self._prompt = prompt
        self._specs = specs
        self._inputs = Inputs(Graph(prompt), specs, {})

    async def check(self, node_id: str) -> list[Problem]:
        """All that is wrong with a node's inputs. Raises what its INPUT_TYPES or VALIDATE_INPUTS raise."""
        node = self._prompt[node_id]
        spec = self._specs[node["class_type"]]
        custom = _Custom(spec)
        problems = [
            found
            for declared in spec.inputs.values()
            for found in self._check_declared(declared, node["inputs"], custom)
        ]
        problems += [
            found
            for name, value in node["inputs"].items()
            if name not in spec.inputs and is_link(value)
            for found in self._check_end(name, value, None)
        ]
        return problems or await self._check_custom(node_id, spec, custom)

    def _check_declared(self, declared: InputSpec, inputs: dict[str, Any], custom: _Custom) -> Iterator[Problem]:
        value = inputs.get(declared.name)
        if value is None:
            if declared.required:
                yield problem(
                    "required_input_missing",
                    "A required input is missing",
                    declared.name,
                    input_name=declared.name,
                    input_config=declared.config,
                )
        elif isinstance(value, list):
            yield from self._check_link(declared, value, custom)
        else:
            yield from _check_literal(declared, unwrap(value), judged_by_node=custom.judges(declared.name))

    def _check_link(self, declared: InputSpec, link: list[Any], custom: _Custom) -> Iterator[Problem]:
        broken = list(self._check_end(declared.name, link, declared.config))
        yield from broken
        if broken or custom.judges_types:
            return
        received = self._type_of(link)
        if not fits(received, declared.type):
            yield problem(
                "return_type_mismatch",
                "The linked output has another type than the input",
                f"{declared.name}: {_type_name(received)} is linked to {_type_name(declared.type)}",
                input_name=declared.name,
                input_config=declared.config,
                received_type=_type_name(received),
                linked_node=link,
            )

    def _check_end(self, name: str, link: list[Any], config: Any) -> Iterator[Problem]:
        """A link must lead to an output that exists."""
        if not is_link(link):
            fault = 'it is no pair of a node id and an output number (write a literal list as {"__value__": [...]})'
        elif link[0] not in self._prompt:
            fault = f"node {link[0]} is not in the prompt"
        else:
            fault = self._missing_slot(link)
        if fault:
            yield problem(
                "bad_linked_input",
                "The input is linked to something that is not there",
                f"{name}: {fault}",
                input_name=name,
                input_config=config,
                received_value=link,
            )

    def _missing_slot(self, link: list[Any]) -> str:
        class_type = self._prompt[link[0]]["class_type"]
        try:
            self._type_of(link)
        except IndexError:
            return f"node {link[0]} ({class_type}) has no output {link[1]}"
        return f"outputs count from 0, and this is {link[1]}" if link[1] < 0 else ""

    def _type_of(self, link: list[Any]) -> Any:
        node_class = self._specs.nodes[self._prompt[link[0]]["class_type"]]
        return getattr(node_class, "RETURN_TYPES", ())[link[1]]

    async def _check_custom(self, node_id: str, spec: NodeSpec, custom: _Custom) -> list[Problem]:
        """Ask VALIDATE_INPUTS. It sees literals; linked inputs are None."""
        if custom.function is None:
            return []
        values = self._inputs.gather(node_id, {}).values
        judged = {name: value for name, value in values.items() if custom.judges(name)}
        asked = {**judged, "input_types": (self._received_types(node_id, spec),)} if custom.judges_types else judged
        answers = await call_each(custom.function, asked, whole=spec.wants_lists)
        refusals = [answer for answer in answers if answer is not True and not is_blocker(answer)]
        return [
            problem(
                "custom_validation_failed",
                "The node does not accept its inputs",
                f"{name} - {refusal}" if isinstance(refusal, str) else name,
                input_name=name,
                input_config=spec.inputs[name].config if name in spec.inputs else None,
            )
            for refusal in refusals
            for name in judged or spec.inputs
        ]

    def _received_types(self, node_id: str, spec: NodeSpec) -> dict[str, Any]:
        inputs = self._prompt[node_id]["inputs"]
        return {name: self._type_of(value) for name, value in inputs.items() if is_link(value) and name in spec.inputs}


class _Custom:
    """A class's VALIDATE_INPUTS. Inputs that it names, or all when it takes any, it judges itself."""

    def __init__(self, spec: NodeSpec) -> None:
        self.function = getattr(spec.node_class, "VALIDATE_INPUTS", None)
        parameters = inspect.signature(self.function).parameters.values() if self.function else ()
        self._names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        self._all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def judges(self, name: str) -> bool:
        return self._all or name in self._names

    @property
    def judges_types(self) -> bool:
        return "input_types" in self._names


def _check_literal(declared: InputSpec, value: Any, judged_by_node: bool) -> Iterator[Problem]:
    """A literal must be of its widget's type, and what the widget offers unless the node judges that itself."""
    about = {"input_name": declared.name, "input_config": declared.config, "received_value": value}
    try:
        value = coerce(value, declared.type)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value!r} is not a finite number")
    except ValueError as error:
        about["received_value"] = short(value)  # JSON has no word for NaN and infinity
        yield problem(
            "invalid_input_type",
            f"The value is not of the type {_type_name(declared.type)}",
            f"{declared.name}: {error}",
            **about,
            exception_message=str(error),
        )
        return
    if not judged_by_node:
        yield from _check_range(declared, value, about)
        yield from _check_choice(declared, value, about)


def _check_range(declared: InputSpec, value: Any, about: dict[str, Any]) -> Iterator[Problem]:
    if not isinstance(value, (int, float)):
        return
    smallest, largest = declared.options.get("min"), declared.options.get("max")
    if smallest is not None and value < smallest:
        yield problem(
            "value_smaller_than_min",
            f"The value {value} is smaller than the minimum of {smallest}",
            declared.name,
            **about,
        )
    if largest is not None and value > largest:
        yield problem(
            "value_bigger_than_max",
            f"The value {value} is bigger than the maximum of {largest}",
            declared.name,
            **about,
        )


def _check_choice(declared: InputSpec, value: Any, about: dict[str, Any]) -> Iterator[Problem]:
    choices = declared.choices
    if choices is None:
        return
    for chosen in value if declared.several and isinstance(value, list) else [value]:
        if chosen not in choices:
            few = len(choices) <= CHOICES_SHOWN
            offered = str(choices) if few else f"the {len(choices)} choices"
            yield problem(
                "value_not_in_list",
                "The value is not among the choices",
                f"{declared.name}: {short(chosen)} is not in {offered}",
                **{**about, "input_config": declared.config if few else None},
            )


def _type_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else "COMBO"
