"""Makes a CL_Benchmark folder from public data sets: `python -m data_prep hub --out DIR`."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import UserError
from data_prep.folder import BUNDLED_INSTRUCTIONS
from data_prep.hub_sources import HUB_SOURCES, HubSource
from data_prep.orders import near_name
from data_prep.subsets import balanced_quotas, seeded_random

if TYPE_CHECKING:
    from datasets import Dataset

# The sizes of the published files: about 1,000 training rows a class, at most 7,600 test rows.
TRAIN_ROWS_PER_CLASS = 1000
TEST_ROWS = 7600

Counts = dict[str, dict[str, int]]  # task -> split -> rows


def make_folder(out: Path, tasks: Sequence[str], *, seed: int, local: Path | None) -> Counts:
    """Write OUT/CL_Benchmark, OUT/configs and OUT/SOURCES.json; returns each split's number of rows.

    `local` is a folder with <task>/train and <task>/test, as .parquet, .jsonl, .json or .csv with the hub's
    columns, read instead of the hub. OUT appears whole or not at all. Raises UserError for unknown tasks, an
    OUT that exists, data sets that cannot be fetched or read.
    """
    unknown = [f'no task "{name}"{near_name(name, HUB_SOURCES)}' for name in tasks if name not in HUB_SOURCES]
    if unknown:
        raise UserError(f"--tasks: {'; '.join(unknown)} (there are {', '.join(HUB_SOURCES)})")
    if out.exists():
        raise UserError(f"--out: {out} exists; name a new folder, or remove that one first")
    temporary = out.parent / f".tmp-{out.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        counts = {name: _write_task(temporary, HUB_SOURCES[name], seed, local) for name in tasks}
        _write_surroundings(temporary, counts, seed, local)
        os.rename(temporary, out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror}); free space or name another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _write_task(root: Path, source: HubSource, seed: int, local: Path | None) -> dict[str, int]:
    folder = root / "CL_Benchmark" / source.family / source.task
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="data-prep-") as cache:
        test = choose_test_rows(source, _open_split(source, "test", local, cache), seed)
        seen = {row["sentence"] for row in test}
        train = choose_train_rows(source, _open_split(source, "train", local, cache), seed, exclude=seen)
    for split, rows in (("train", train), ("test", test)):
        if not rows:
            raise UserError(f"{source.task}: no usable row in {split}; look into its files")
        _write_json(folder / f"{split}.json", rows)
    _write_json(folder / "labels.json", list(source.labels))
    return {"train": len(train), "test": len(test)}


def _write_surroundings(root: Path, counts: Counts, seed: int, local: Path | None) -> None:
    """The instructions in the benchmark's own form, and where every row came from."""
    bundled: dict[str, str] = json.loads(BUNDLED_INSTRUCTIONS.read_text(encoding="utf-8"))["families"]
    (root / "configs").mkdir()
    _write_json(
        root / "configs" / "instruction_config.json",
        {family: [{"instruction_type": "zero-shot", "instruction": text}] for family, text in bundled.items()},
    )
    tasks = {}
    for name, rows in counts.items():
        source = HUB_SOURCES[name]
        place = {"local": str(local)} if local else {"dataset": source.dataset, "revision": source.revision}
        tasks[name] = {**place, "rows": rows}
    _write_json(root / "SOURCES.json", {"made_by": "python -m data_prep hub", "seed": seed, "tasks": tasks})


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def choose_train_rows(
    source: HubSource, dataset: "Dataset", seed: int, *, exclude: Collection[str] = ()
) -> list[dict[str, str]]:
    """Up to TRAIN_ROWS_PER_CLASS converted rows of each class (or all), none with a sentence in `exclude`."""
    dataset = _rename(source, dataset)
    classes = _class_rows(source, dataset, seed, "train")
    per_class = dataset.num_rows if source.all_rows else TRAIN_ROWS_PER_CLASS
    return _choose(source, dataset, classes, [per_class] * len(classes), seed, exclude)


def choose_test_rows(source: HubSource, dataset: "Dataset", seed: int) -> list[dict[str, str]]:
    """All converted rows, or of more than TEST_ROWS a sample as balanced as the classes allow."""
    dataset = _rename(source, dataset)
    classes = _class_rows(source, dataset, seed, "test")
    quotas = balanced_quotas([len(rows) for rows in classes], TEST_ROWS)
    return _choose(source, dataset, classes, quotas, seed, ())


def _rename(source: HubSource, dataset: "Dataset") -> "Dataset":
    names = source.column_names(dataset.column_names)
    dataset = dataset.select_columns(list(names))
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _class_rows(source: HubSource, dataset: "Dataset", seed: int, split: str) -> list[np.ndarray]:
    """Row positions of each class number, in an order drawn from the seed. Rows of no class are in none."""
    numbers = np.asarray(dataset.with_format("numpy")[source.label_column][:], dtype=np.int64)
    if source.by_position and numbers.max(initial=0) == len(source.classes):
        numbers = numbers - 1  # a copy whose columns are not known to be the official ones may count from 1
    rng = np.random.default_rng(seeded_random(seed, source.task, "hub", split).getrandbits(64))
    return [rng.permutation(np.flatnonzero(numbers == k)) for k in range(len(source.classes))]


def _choose(
    source: HubSource,
    dataset: "Dataset",
    classes: Sequence[np.ndarray],
    quotas: Sequence[int],
    seed: int,
    exclude: Collection[str],
) -> list[dict[str, str]]:
    """The first rows of each class that convert and are not excluded, up to its quota, classes mixed."""
    chosen: list[dict[str, str]] = []
    for number, (positions, quota) in enumerate(zip(classes, quotas, strict=True)):
        taken = 0
        for position in positions:
            if taken == quota:
                break
            row = source.convert({**dataset[int(position)], source.label_column: number})
            if row is not None and row["sentence"] not in exclude:
                chosen.append(row)
                taken += 1
    seeded_random(seed, source.task, "hub", "order").shuffle(chosen)
    return chosen


def _open_split(source: HubSource, split: str, local: Path | None, cache: str) -> "Dataset":
    """The split's rows with the hub's columns, whether from the hub or from a local file."""
    from datasets import load_dataset

    if local is None:
        files = source.files[0 if split == "train" else 1]
        place = f"hf://datasets/{source.dataset}@{source.revision}/{files}"
        builder, remedy = "parquet", "check the network, or read local files with --from-local DIR"
    else:
        place, builder = _local_file(local / source.task, split)
        remedy = "write it again, with the columns " + ", ".join(source.columns)
    try:
        # Any library below may fail here in a way of its own (network, Parquet, CSV, JSON).
        return load_dataset(builder, data_files=place, split="train", cache_dir=cache)
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [""]
        raise UserError(
            f"{source.task}: {place} cannot be read ({type(error).__name__}: {reason[0]}); {remedy}"
        ) from error


def _local_file(folder: Path, split: str) -> tuple[str, str]:
    """(path, name of the reader) of a split's local file."""
    for suffix, builder in ((".parquet", "parquet"), (".jsonl", "json"), (".json", "json"), (".csv", "csv")):
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return str(path), builder
    raise UserError(f"--from-local: no {folder / split}.parquet, .jsonl, .json or .csv; put one there")
