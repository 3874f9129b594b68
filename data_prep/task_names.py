"""Names of tasks: they become names of files and folders of a run."""

import re

_LEGAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
RESERVED = "untrained"  # stands in a run's folders where the name of the last task learnt does otherwise


def task_name_fault(name: str) -> str:
    """Why `name` cannot name a task; empty where it can."""
    if name == RESERVED:
        return f'"{name}" is reserved for the untouched model; give the task another name'
    if not _LEGAL.fullmatch(name):
        return (
            f"{name!r:.80} cannot name a task, since files are called after it; legal are 1 to 64 of the characters "
            "A-Z a-z 0-9 _ . + -, the first a letter or a digit; rename it"
        )
    return ""
