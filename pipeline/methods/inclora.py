"""`inclora`: a new LoRA for each task, the past frozen and active (methods.md section 5)."""

from __future__ import annotations

from pipeline.methods.adapter_method import AdapterMethod
from pipeline.recipe import IncLora


class IncrementalLora(AdapterMethod[IncLora]):
    """A new LoRA for each task; the earlier ones are frozen, active and merged."""
