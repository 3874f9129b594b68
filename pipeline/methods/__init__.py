"""The methods by name."""

from collections.abc import Mapping
from typing import Any

from pipeline.methods.base import Method, TaskContext
from pipeline.methods.gorp import ProjectedByGradients
from pipeline.methods.inclora import IncrementalLora
from pipeline.methods.lbcl import InjectedTriplets
from pipeline.methods.mtl import JointAdapter
from pipeline.methods.olora import OrthogonalLora
from pipeline.methods.pegp import ProjectedByFeatures
from pipeline.methods.pertask import OneModelPerTask
from pipeline.methods.seqlora import SequentialAdapter

METHODS: Mapping[str, type[Method[Any]]] = {
    "seqlora": SequentialAdapter,
    "inclora": IncrementalLora,
    "mtl": JointAdapter,
    "olora": OrthogonalLora,
    "pertask": OneModelPerTask,
    "pegp": ProjectedByFeatures,
    "gorp": ProjectedByGradients,
    "lbcl": InjectedTriplets,
}

__all__ = ["METHODS", "Method", "TaskContext"]
