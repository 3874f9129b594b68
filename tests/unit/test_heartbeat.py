"""Ranks on several hosts notice, over a real store, that one of them has gone; and only then."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeline.heartbeat import Heartbeat

HOSTS = ["north", "north", "south", "south"]
QUICK = {"interval": 0.05, "patience": 1.0}


class Beating:
    """Heartbeats of the given ranks in this process, each with a connection of its own, and whom they lost."""

    def __init__(self, *ranks: int) -> None:
        self.lost: dict[int, str] = {}
        self.told = threading.Event()
        self.served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.beats = {rank: self.start(rank) for rank in ranks}

    def start(self, rank: int) -> Heartbeat:
        def lost(reason: str) -> None:
            self.lost[rank] = reason
            self.told.set()

        store = dist.TCPStore("127.0.0.1", self.served.port, is_master=False, timeout=timedelta(seconds=5))
        return Heartbeat(store, rank, HOSTS, lost=lost, **QUICK)

    def stop(self) -> None:
        for beat in self.beats.values():
            beat.stop()


@pytest.fixture
def beating() -> Beating:
    return Beating(0, 1, 2, 3)


def test_while_all_beat_nobody_leaves(beating: Beating) -> None:
    assert not beating.told.wait(3 * QUICK["patience"])
    beating.stop()


def test_rank_0_notices_whoever_stands_still_and_says_where(beating: Beating) -> None:
    beating.beats[2].stop()
    start = time.monotonic()
    assert beating.told.wait(10)
    assert time.monotonic() - start >= QUICK["patience"] / 2
    beating.stop()
    assert beating.lost == {0: "nothing has been heard of south (rank 2) for 1 s"}


def test_the_others_notice_that_rank_0_has_gone(beating: Beating) -> None:
    beating.beats[0].stop()
    assert beating.told.wait(10)
    time.sleep(QUICK["patience"])
    assert beating.lost == {rank: "nothing has been heard of north (rank 0) for 1 s" for rank in (1, 2, 3)}


def test_a_store_that_has_gone_is_rank_0_that_has_gone(beating: Beating) -> None:
    beating.beats[0].stop()
    del beating.served
    assert beating.told.wait(10)
    time.sleep(QUICK["patience"])
    assert set(beating.lost) == {1, 2, 3}


def test_after_the_end_of_a_run_ranks_leave_in_any_order(beating: Beating) -> None:
    beating.stop()
    del beating.served
    assert not beating.told.wait(3 * QUICK["patience"])
