"""Which groups of a recipe's keys do not go with each other, each told with its reason as a ValueError."""

from __future__ import annotations

from pipeline.recipe_groups import Adapter, Engine, Gorp, MethodSettings, Model, Training


def check_adapter(adapter: Adapter, method: MethodSettings, training: Training, engine: Engine) -> None:
    """An adapter that the method trains and the engine can run; of tasks trained together one training."""
    kind = adapter.kind
    if (kind == "triplet") != (method.name == "lbcl"):
        raise ValueError(
            f"adapter.kind: {kind} does not go with {method.name}: triplets are lbcl's alone, and it trains "
            "nothing else; leave adapter.kind out for the method's own"
        )
    if kind != "lora" and method.name in ("inclora", "olora", "pertask"):
        raise ValueError(
            f"adapter.kind: {kind} is one module through the stream, and {method.name} needs a new LoRA for "
            "each task; use method=seqlora or method=pegp, or adapter=lora"
        )
    if kind != "lora" and method.name == "gorp":
        raise ValueError(
            f"adapter.kind: {kind} has no place in gorp, which trains LoRA and full-rank cores; use adapter=lora, "
            "or method=pegp"
        )
    if method.name == "mtl":
        _one_training(training)
    if kind == "prefix" and engine.gradient_checkpointing:
        raise ValueError(
            "engine.gradient_checkpointing: true recomputes layers without the cache that holds the prefix; "
            "set it to false, or choose another adapter"
        )


def check_bits(model: Model, method: MethodSettings, training: Training, engine: Engine) -> None:
    """What cannot be done with few bits."""
    packed = model.quantization
    cores = isinstance(method, Gorp) and method.trains_cores
    if packed == "int8" and engine.zero == 3:
        raise ValueError(
            "model.quantization: int8 gains nothing in engine.zero: 3, since bitsandbytes keeps a whole copy of "
            "the weights on every rank beside the scattered one; set engine.zero: 2, or model.quantization: null"
        )
    if packed is not None and cores:
        raise ValueError(
            f"model.quantization: {packed} leaves gorp's cores no weight that they could be merged into; set "
            "method.parts: B+S (LoRA alone), or model.quantization: null"
        )
    moments = cores or getattr(method, "gradient_space", None) == "first_moment"
    if training.optimizer == "adamw_8bit" and moments:
        raise ValueError(
            "training.optimizer: adamw_8bit keeps moments in 8 bits, and gorp's spaces and cores are made of "
            "moments; set training.optimizer: adamw"
        )


def _one_training(training: Training) -> None:
    """What tasks that are trained together cannot each have."""
    given = [
        f"training.per_task.{name}.{key}"
        for name, task in training.per_task.items()
        for key in ("max_steps", "learning_rate")
        if getattr(task, key) is not None
    ]
    given += ["training.max_steps"] if training.max_steps is not None else []
    if given:
        raise ValueError(
            f"{given[0]}: mtl trains the rows of all tasks together, at one rate and each for its epochs; "
            "set it to null"
        )
