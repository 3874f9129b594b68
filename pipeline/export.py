"""`python -m pipeline.export RUN`: what a run has learnt, as a stock PEFT adapter or as a plain transformers folder.

Reads the run's recipe and stages, not its task data; the backbone is read for `--merged` alone.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from data_prep.errors import UserError
from data_prep.files import TEMPORARY
from data_prep.orders import near_name
from pipeline.adapters.lora import Factors, from_tensors
from pipeline.adapters.triplet import stage_factors
from pipeline.recipe import SYNTHETIC, Recipe
from pipeline.stage_files import MANIFEST, DamagedStageError, verified_manifest
from pipeline.stages import Stage

USER_FAULT = 2
_AUTO_CLASS = {"t5": "ModelForSeq2SeqLM", "llama2": "ModelForCausalLM"}


class Export(NamedTuple):
    """What to export of a run."""

    run_dir: Path
    after: str | None = None  # the last task that counts; None: the last finished one
    part: str = "stream"  # all tasks up to `after`, or "task": that one alone
    merged: bool = False
    out: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Export one run; 0, or 2 where the user can mend what stood in the way."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.export",
        description="Write what a run has learnt as a PEFT adapter that PeftModel.from_pretrained loads, or --merged "
        "as a plain transformers folder in float32.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--after", metavar="TASK", help="as it was after this task (default: the last finished one)")
    parser.add_argument(
        "--part",
        choices=("stream", "task"),
        default="stream",
        help="stream: all tasks up to there, as one adapter (default); task: the LoRA of that one task",
    )
    parser.add_argument("--merged", action="store_true", help="the backbone with the updates merged")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/export/TASK...)")
    try:
        folder, line = export(Export(**vars(parser.parse_args(arguments))))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return USER_FAULT
    print(f"exported: {folder}\n{line}")
    return 0


def export(wanted: Export) -> tuple[Path, str]:
    """Write the export; returns its folder and a line of Python that loads it.

    Raises `UserError` before anything is written, but for a full disk or a folder that cannot be written; the folder
    is there whole or not at all.
    """
    recipe = _recipe(wanted.run_dir)
    finished = _stage_folders(wanted.run_dir, recipe)
    last = _last_index(wanted, recipe, finished)
    after = recipe.task_names[last - 1]
    ending = ("-task" if wanted.part == "task" else "") + ("-merged" if wanted.merged else "")
    final = (wanted.out or wanted.run_dir / "export" / f"{after}{ending}").resolve()
    if final.exists():
        raise UserError(f"{final}: exists already, and is left as it is; choose another folder: --out FOLDER")
    write = _content(wanted, recipe, lambda index: _stage(finished, index, recipe), last)
    _place(final, write)
    library, prefix = ("transformers", "Auto") if wanted.merged else ("peft", "AutoPeft")
    loader = prefix + _AUTO_CLASS[recipe.model.family]
    return final, _loading(library, loader, final, recipe.model.quantization)


def _loading(library: str, loader: str, folder: Path, quantization: str | None) -> str:
    """The line of Python that loads an export, beside a backbone of the run's own bits."""
    if quantization is None:
        return f"from {library} import {loader}; model = {loader}.from_pretrained({str(folder)!r})"
    bits = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
    config = f"BitsAndBytesConfig({bits if quantization == 'nf4' else 'load_in_8bit=True'})"
    return (
        f"from {library} import {loader}; from transformers import BitsAndBytesConfig; "
        f"model = {loader}.from_pretrained({str(folder)!r}, quantization_config={config})"
    )


def trains_one_lora(recipe: Recipe) -> bool:
    """Whether the run's method trains one LoRA through the stream, and not one per task."""
    return not recipe.method.new_lora_each_task


def _recipe(run_dir: Path) -> Recipe:
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the folder of a run (output.dir of its recipe)")
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: not the folder of a run, it holds no recipe.yaml; give a folder that a run wrote")
    return Recipe.load_resolved(run_dir / "recipe.yaml")


def _stage_folders(run_dir: Path, recipe: Recipe) -> dict[int, list[Path]]:
    """The folders of finished stages by index, from 1, as they are named; their content is checked when read."""
    folders: dict[int, list[Path]] = {}
    root = run_dir / "stages"
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        name = re.fullmatch(r"(\d{2,})-.+-.+", folder.name)
        if name and folder.is_dir() and 1 <= int(name[1]) <= len(recipe.task_names):
            folders.setdefault(int(name[1]), []).append(folder)
    if not folders:
        raise UserError(f"{run_dir}: no task is finished yet, so there is nothing to export; run the recipe first")
    return folders


def _last_index(wanted: Export, recipe: Recipe, finished: Mapping[int, object]) -> int:
    """The index of the last task that counts."""
    if wanted.after is None:
        return max(finished)
    names = recipe.task_names
    if wanted.after not in names:
        near = near_name(wanted.after, names)
        raise UserError(f'--after: no task "{wanted.after}"; the stream is {", ".join(names)}{near}')
    index = names.index(wanted.after) + 1
    if index not in finished:
        there = ", ".join(names[i - 1] for i in sorted(finished))
        raise UserError(
            f"--after: {wanted.after} is not finished in {wanted.run_dir}; finished: {there}; name one of them, "
            "or run the recipe again: it goes on"
        )
    return index


def _stage(finished: Mapping[int, Sequence[Path]], index: int, recipe: Recipe) -> Stage:
    """The whole stage of that index, every checksum verified."""
    task = recipe.task_names[index - 1]
    match finished.get(index, ()):
        case [folder]:
            manifest = verified_manifest(folder)
            if (manifest["index"], manifest["task"]) != (index, task):
                raise DamagedStageError(folder, MANIFEST, "belongs to another stage")
            return Stage(folder, index, task, manifest["key"])
        case []:
            raise UserError(f"the stage of task {index} ({task}) is missing; run the recipe again: it trains that task")
        case several:
            raise UserError(
                f"task {index} ({task}) has {len(several)} stages, of different training: "
                f"{', '.join(map(str, several))}; move those away that are not to be exported"
            )


def _content(wanted: Export, recipe: Recipe, stage: Callable[[int], Stage], last: int) -> Callable[[Path], None]:
    """Read what is exported; returns what writes it into an empty folder."""
    from pipeline import export_peft  # not at the top: PEFT takes seconds to load, and a typing error is told at once

    tensors = stage(last).load_trained()
    matrices = {name.removesuffix(".W"): tensors.pop(name) for name in sorted(tensors) if name.endswith(".W")}
    if matrices and wanted.part == "task":
        raise UserError(
            f"--part task: the method {recipe.method.name} changed whole weights, such as {min(matrices)}, which hold "
            "all tasks up to there; leave --part out"
        )
    if matrices and not wanted.merged:
        raise UserError(
            f"{wanted.run_dir}: the method {recipe.method.name} changed {len(matrices)} whole weights, such as "
            f"{min(matrices)}, which no PEFT adapter holds; add --merged for a plain transformers folder"
        )
    kind = export_peft.kind_of(tensors) if tensors else "lora"
    _refuse(wanted, recipe, kind)
    base = _base(recipe)
    if kind == "prompt":
        return export_peft.prompt_adapter(tensors["prompt"], base).write
    if kind == "prefix":
        return export_peft.prefix_adapter(tensors, base).write
    alone = wanted.part == "task" or trains_one_lora(recipe) or not recipe.method.adds_up
    updates: dict[str, list[Factors]] = {}
    for index in [last] if alone else range(1, last + 1):
        trained = stage(index).load_trained()
        for layer, factors in (from_tensors(trained) | stage_factors(trained)).items():
            updates.setdefault(layer, []).append(factors)
    if wanted.merged:
        from pipeline.export_merged import merged_backbone

        trained_on = stage(last).info["model_fingerprint"]
        return merged_backbone(recipe.model, updates, matrices, trained_on=trained_on).write
    if not updates:
        raise UserError(f"{wanted.run_dir}: no layer had a free direction left, so there is no LoRA to export")
    return export_peft.lora_adapter(updates, base).write


def _refuse(wanted: Export, recipe: Recipe, kind: str | None) -> None:
    """Raise for what cannot be expressed, with the reason."""
    if kind not in ("lora", "prompt", "prefix"):
        reason = (
            "a bottleneck adapter cannot be exported: PEFT has no such adapter, and its activation function "
            "keeps it from being merged into a linear layer"
            if kind == "bottleneck"
            else f"what method {recipe.method.name} trains has no form that PEFT or transformers knows"
        )
        raise UserError(f"{wanted.run_dir}: {reason}; the tensors lie in stages/*/trained, as safetensors")
    if wanted.merged and recipe.model.quantization is not None:
        raise UserError(
            f"--merged: this run learnt beside a backbone quantized to {recipe.model.quantization}, into which nothing "
            "can be merged, and with the full weights its updates were never trained; leave --merged out: PEFT loads "
            "the adapter beside a backbone that is quantized likewise"
        )
    if kind != "lora" and wanted.merged:
        raise UserError(f"--merged: a {kind} is no part of any weight; leave --merged out: PEFT loads it as an adapter")
    if wanted.part == "task" and (kind != "lora" or trains_one_lora(recipe)):
        what = "LoRA" if kind == "lora" else kind
        raise UserError(
            f"--part task: this run trains one {what} through the stream, so no task has one of its own; leave --part "
            f"out for the {what} as it stood after a task"
        )


def _base(recipe: Recipe) -> Any:
    """How the adapter names its backbone: as the recipe does, or by the folder of one made on first use."""
    from pipeline.checkpoints import backbone_folder
    from pipeline.export_peft import Base

    model = recipe.model
    path = str(backbone_folder(model)) if model.path == SYNTHETIC else model.path
    return Base(model.family, path, None if Path(path).is_absolute() else model.revision)


def _place(final: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside `final` and rename it."""
    temporary = final.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{final}: cannot be written ({error}); free space or choose another: --out FOLDER") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
