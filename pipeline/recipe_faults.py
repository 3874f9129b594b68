"""All faults of a recipe in one message: *field path: what was got; what is legal; what to do*."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from data_prep.orders import near_name


def fault_lines(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line for each fault of a `ValidationError`, under its dotted field path."""
    return [_line(fault, root) for fault in error.errors()]


def render_faults(shown_path: str, faults: Iterable[str]) -> str:
    """The message for the faults of one recipe."""
    lines = sorted(set(faults))
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return "\n".join([f"{shown_path}: {count}", *(f"  {line}" for line in lines)])


def _line(fault: ErrorDetails, root: type[BaseModel]) -> str:
    place = _dotted(fault["loc"])
    got, context = fault["input"], fault.get("ctx", {})
    shown = f"{got!r:.80}"
    match fault["type"]:
        case "missing":
            return f"{place}: missing; add it (shipped recipes in recipes/ show every key)"
        case "extra_forbidden":
            legal = _keys_at(fault["loc"][:-1], root)
            key = str(fault["loc"][-1])
            return f"{place}: no such key{near_name(key, legal) or '; legal here: ' + ', '.join(legal)}"
        case "literal_error":
            return f"{place}: {shown} is not one of {context['expected']}{_near_literal(got, context)}"
        case "union_tag_invalid":
            name = str(context["tag"])
            legal = [part.strip(" '") for part in str(context["expected_tags"]).split(",")]
            what = "name: {!r} is no method" if place == "method" else "kind: {!r} is no kind of adapter"
            return f"{place}.{what.format(name)}{near_name(name, legal) or '; legal: ' + ', '.join(legal)}"
        case "union_tag_not_found":
            return f"{place}.name: missing; name the method, such as inclora"
        case "greater_than":
            return f"{place}: {shown} is not greater than {context['gt']}"
        case "greater_than_equal":
            return f"{place}: {shown} is less than {context['ge']}"
        case "less_than":
            return f"{place}: {shown} is not less than {context['lt']}"
        case "none_required" | "too_long":
            return f"{place}: {shown} is not supported yet; leave it at its default"
        case "value_error":
            text = str(fault["msg"]).removeprefix("Value error, ")
            return f"{place}: {text}" if fault["loc"] else text
        case "string_type":
            return f"{place}: {shown} is not text{_quoted(got)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{place}: {shown} is not a group of keys"
        case _:
            return f"{place}: {shown}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _quoted(got: object) -> str:
    """What to write where YAML read a word or a number as something else."""
    if isinstance(got, bool):
        return f'; YAML reads yes, no, on, off, true and false so: write the word in quotes, "{"yes" if got else "no"}"'
    return f'; write it in quotes, "{got}"' if isinstance(got, int | float) else ""


def _dotted(location: tuple[int | str, ...]) -> str:
    """`('order', 'tasks', 3)` -> `order.tasks[3]`; pydantic's own words for union branches are left out."""
    text = ""
    for place, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
        elif "[" not in part and not (place == 1 and location[0] in ("method", "adapter") and len(location) > 2):
            text += f".{part}" if text else part
    return text or "recipe"


def _keys_at(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The legal keys of the group that `location` leads to."""
    group: Any = root
    for part in location:
        if isinstance(group, type) and issubclass(group, BaseModel) and part in group.model_fields:
            group = group.model_fields[str(part)].annotation
        else:  # a branch of a union named by its tag, or a key of a mapping of groups
            group = _member(group, part)
    return list(group.model_fields) if isinstance(group, type) and issubclass(group, BaseModel) else []


def _member(annotation: Any, tag: int | str) -> Any:
    for member in get_args(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            name = member.model_fields.get("name") or member.model_fields.get("kind")
            if name is None or tag in get_args(name.annotation):
                return member
        nested = _member(member, tag)
        if nested is not None:
            return nested
    return None


def _near_literal(got: object, context: dict[str, Any]) -> str:
    legal = [part.strip(" '") for part in str(context["expected"]).replace(" or ", ",").split(",")]
    return near_name(got, legal) if isinstance(got, str) else ""
