"""`mtl`: all tasks of the order jointly, the upper reference (methods.md section 5)."""

from __future__ import annotations

from pipeline.methods.adapter_method import AdapterMethod
from pipeline.recipe import Mtl


class JointAdapter(AdapterMethod[Mtl]):
    """One LoRA, bottleneck, prompt or prefix for all tasks, trained once on the rows of all of them."""
