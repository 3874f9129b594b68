"""A user's own files: JSON arrays, JSON lines and CSV, read with `datasets` from a temporary cache."""

import csv
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.rows import FIELDS, NOT_JSON, NOT_UTF8, Fault, is_text, parse_array, read_content

SUFFIXES = (".json", ".jsonl", ".csv")


def file_kind(path: Path) -> str:
    """The suffix that says how a file is read, a trailing .gz aside. Raises UserError for any other."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: cannot tell the format; name the file .json, .jsonl or .csv (.gz may follow)")
    return suffix


def read_custom(path: Path, *, text_key: str, label_key: str) -> tuple[list[Any], list[Fault]]:
    """The records of a user's file as dicts, and the faults of its form.

    A broken line of a JSON-lines file is one bad row: its record is None and its fault is returned. Any other
    fault of form is fatal and leaves no records. Every value of a CSV file is a string.
    """
    kind = file_kind(path)
    content = read_content(path).removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return [], [Fault(None, NOT_JSON, "is empty; a split needs at least one row", fatal=True)]
    if kind == ".csv":
        return _read_csv(content)
    is_array = content.lstrip().startswith(b"[")
    records, faults = parse_array(content) if is_array else _parse_lines(content)
    if any(fault.fatal for fault in faults):
        return [], faults
    return _read_records(records, (text_key, label_key)), faults


def _parse_lines(content: bytes) -> tuple[list[Any], list[Fault]]:
    records: list[Any] = []
    faults: list[Fault] = []
    for raw in content.split(b"\n"):
        if not raw.strip():
            continue
        record = _parse_line(len(records), raw)
        if isinstance(record, Fault):
            faults.append(record)
        records.append(None if isinstance(record, Fault) else record)
    return records, faults


def _parse_line(number: int, raw: bytes) -> Any:
    """The line's object, or the Fault of a line that holds none."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(number, NOT_UTF8, f"byte {error.start} of the line is not UTF-8")
    except json.JSONDecodeError as error:
        return Fault(number, NOT_JSON, f"not JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        return Fault(number, NOT_JSON, f"not JSON that can be read ({error})")
    return value if isinstance(value, dict) else Fault(number, NOT_JSON, "the line is not a JSON object")


def _read_records(records: list[Any], keys: tuple[str, ...]) -> list[Any]:
    """The records with the texts that `datasets` reads; one without a string under each key stays as it is.

    Left to infer types, `datasets` takes a column of dates for timestamps and, where one label is a number,
    every "1" for one; and it fails a whole file for one bad text, unnamed. So it is given strings alone.
    """
    usable = [isinstance(record, dict) and all(is_text(record.get(key)) for key in keys) for record in records]
    rows = [record for record, use in zip(records, usable, strict=True) if use]
    if not rows:
        return records
    with _quiet_datasets() as folder:
        from datasets import Dataset, Features, Value

        source = Path(folder, "rows.jsonl")
        lines = (json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)
        source.write_text("".join(lines), encoding="utf-8")
        features = Features({key: Value("string") for key in keys})
        loaded = Dataset.from_json(str(source), features=features, cache_dir=folder, keep_in_memory=True)
        texts = iter(loaded.to_list())
    return [next(texts) if use else record for record, use in zip(records, usable, strict=True)]


def _read_csv(content: bytes) -> tuple[list[Any], list[Fault]]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", errors="replace")
        row = max(sum(1 for _ in csv.reader(io.StringIO(before))) - 2, 0)
        return [], [Fault(row, NOT_UTF8, f"byte {error.start} of the file is not UTF-8", fatal=True)]
    header, faults = _csv_shape(text)
    if faults:
        return [], faults
    with _quiet_datasets() as folder:
        from datasets import Dataset, Features, Value
        from datasets.exceptions import DatasetGenerationError

        source = Path(folder, "rows.csv")
        source.write_text(text, encoding="utf-8", newline="")
        # All columns as strings, and no value taken for "missing": else a label True becomes a boolean, 1 a
        # number, and the texts "NA" and "None" vanish.
        features = Features({name: Value("string") for name in header})
        try:
            dataset = Dataset.from_csv(
                str(source),
                features=features,
                cache_dir=folder,
                keep_in_memory=True,
                na_filter=False,
            )
        except (DatasetGenerationError, ValueError) as error:
            reason = str(error.__cause__ or error).strip()
            return [], [Fault(None, NOT_JSON, f"cannot be read as rows ({reason})", fatal=True)]
        return dataset.to_list(), []


def _csv_shape(text: str) -> tuple[list[str], list[Fault]]:
    """The columns, and a fatal fault for each row that has not as many fields.

    pandas, below `datasets`, takes the first column for row names where rows are longer than the header: an
    unquoted comma in every text would shift all columns without a word.
    """
    try:
        lines = [fields for fields in csv.reader(io.StringIO(text, newline="")) if fields]
    except csv.Error as error:
        return [], [Fault(None, NOT_JSON, f"cannot be read as rows ({error})", fatal=True)]
    if len(lines) < 2:
        return [], [Fault(None, FIELDS, "has no rows below its header; a split needs at least one", fatal=True)]
    header, *rows = lines
    if len(set(header)) < len(header):
        return [], [Fault(None, NOT_JSON, f"a column name stands twice: {', '.join(header)}", fatal=True)]
    return header, [
        Fault(number, FIELDS, f"{len(fields)} fields, not {len(header)} as in the header", fatal=True)
        for number, fields in enumerate(rows)
        if len(fields) != len(header)
    ]


@contextmanager
def _quiet_datasets() -> Iterator[str]:
    """A temporary folder for the cache; meanwhile `datasets` draws no bars and logs no faults of its own."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
            yield folder
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
