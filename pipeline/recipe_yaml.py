"""YAML as recipes are written in it: plain values under keys of text, and every mistake told with its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import yaml

from data_prep.errors import UserError

MAX_DEPTH = 50  # no recipe nests deeper than six
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
# PyYAML follows YAML 1.1, where 1e-3 is a string; recipes read it as YAML 1.2 does, as a number.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_DROPPED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")  # a date is text here


class _Loader(yaml.SafeLoader):
    """Safe YAML of plain values, with YAML 1.2 floats; keys are text and stand once, values are no cycles."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._peek: Callable[[], yaml.NodeEvent] = self.peek_event
        self._depth = 0
        self._open_anchors: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self._peek()
        anchor = event.anchor
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open_anchors:
                raise UserError(f"{_line(event)}: *{anchor} stands inside what it names; write it out")
            return super().compose_node(parent, index)
        if self._depth == MAX_DEPTH:
            raise UserError(f"{_line(event)}: nested more than {MAX_DEPTH} deep; a recipe is a few groups of keys")
        self._depth += 1
        self._open_anchors.append(anchor)
        node = super().compose_node(parent, index)
        self._open_anchors.pop()
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, str):
                value.encode("utf-8")  # an escape may spell half of a pair of UTF-16
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError
        except (ValueError, KeyError) as error:
            kind = node.tag.rsplit(":", 1)[-1]
            raise UserError(f"{_line(node)}: {str(node.value)!r:.40} is no legal {kind}; mend it") from error
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{_line(key_node)}: a key is a word, not a list or a group; mend it")
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                text = key_node.value
                raise UserError(f'{_line(key_node)}: the key {text:.40} reads as {key!r:.40}; write "{text:.40}"')
            if key in seen:
                raise UserError(f"{_line(key_node)}: the key {key!r} stands twice; remove one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.yaml_constructors = {
    tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN or tag is None
}


def parse_yaml(text: str) -> Any:
    """Parse YAML text into plain values that JSON can hold; raises `UserError` with the line of a fault."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}not valid YAML ({error.problem}); mend the file") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"line {line}: not valid YAML (a character that is not printable); mend the file") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as an escape of no character
        where = f"line {loader.get_mark().line + 1}: " if loader else ""
        raise UserError(f"{where}not valid YAML ({error}); mend the file") from error


def _line(place: yaml.Node | yaml.Event) -> str:
    assert place.start_mark is not None
    return f"line {place.start_mark.line + 1}"
