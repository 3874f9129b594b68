"""`seqlora`: one adapter through the stream, no reset (methods.md section 5)."""

from __future__ import annotations

from pipeline.methods.adapter_method import AdapterMethod
from pipeline.recipe import SeqLora


class SequentialAdapter(AdapterMethod[SeqLora]):
    """One LoRA, bottleneck, prompt or prefix through the stream: each task starts where the last one ended."""
