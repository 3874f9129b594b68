"""The methods by name."""

from collections.abc import Mapping
from typing import Any

from pipeline.methods.base import Method, TaskContext
from pipeline.methods.inclora import IncrementalLora
from pipeline.methods.seqlora import SequentialLora

METHODS: Mapping[str, type[Method[Any]]] = {
    "seqlora": SequentialLora,
    "inclora": IncrementalLora,
}

__all__ = ["METHODS", "Method", "TaskContext"]
