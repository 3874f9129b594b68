"""Seeded choices of rows: class-balanced subsets, the validation rows carved from train.

All of them depend on the seed, the task's name and the rows alone, and keep the rows in file order.
"""

import hashlib
import random
from collections.abc import Sequence

from data_prep.rows import Row

# The carved rows are the same in every run, whatever its seed, so that runs over seeds compare on one set.
CARVE_SEED = 20230707
CARVE_PERCENT = 10


def seeded_random(seed: int, *names: str) -> random.Random:
    """A generator of its own for each (seed, names), the same in every process and on every machine."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def balanced_quotas(sizes: Sequence[int], total: int) -> list[int]:
    """How many to take of each class: `min(total, sum(sizes))` in all, as evenly as the sizes allow.

    Two quotas differ by at most one unless the smaller class is used up; what does not divide evenly goes to
    the first classes. A larger total never takes fewer of any class.
    """
    assert total >= 0
    quotas = [0] * len(sizes)
    left = min(total, sum(sizes))
    while left:
        open_classes = [k for k, size in enumerate(sizes) if quotas[k] < size]
        share = max(1, left // len(open_classes))
        for k in open_classes:
            taken = min(share, sizes[k] - quotas[k], left)
            quotas[k] += taken
            left -= taken
    return quotas


def balanced_subset(
    rows: Sequence[Row], labels: Sequence[str], total: int | None, *, seed: int, task: str, purpose: str
) -> tuple[Row, ...]:
    """`total` rows, spread evenly over `labels`, in file order; all where there are no more.

    The subset of a smaller total lies inside that of a larger one. Rows whose label is not in `labels`
    (MNLI's "-") are taken only when all others are used up.
    """
    if total is None or total >= len(rows):
        return tuple(rows)
    rng = seeded_random(seed, task, purpose)
    classes: dict[str, list[Row]] = {label: [] for label in labels}
    others: list[Row] = []
    for row in rows:
        classes.get(row.label, others).append(row)
    groups = [*classes.values(), others]
    for group in groups:
        rng.shuffle(group)
    quotas = balanced_quotas([len(group) for group in classes.values()], total)
    quotas.append(total - sum(quotas))
    chosen = [row for group, quota in zip(groups, quotas, strict=True) for row in group[:quota]]
    return tuple(sorted(chosen, key=lambda row: row.id))


def carve_validation(rows: Sequence[Row], *, task: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(train, validation): a tenth of each class, at least one row of a class that has two, set apart.

    Rows with the same sentence stay on one side, so validation shares no sentence with what is trained on.
    Rows that share only a passage (BoolQA, MultiRC) may be parted: the figure is for choosing settings.
    """
    rng = seeded_random(CARVE_SEED, task, "validation")
    sentences: dict[str, list[str]] = {}
    for sentence, label in {row.sentence: row.label for row in rows}.items():
        sentences.setdefault(label, []).append(sentence)
    held: set[str] = set()
    for label in sorted(sentences):
        group = sentences[label]
        rng.shuffle(group)
        count = (len(group) * CARVE_PERCENT + 50) // 100
        held.update(group[: max(count, 1) if len(group) > 1 else 0])
    train = tuple(row for row in rows if row.sentence not in held)
    return train, tuple(row for row in rows if row.sentence in held)
