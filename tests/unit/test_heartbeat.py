"""Ranks on several hosts notice, over a real store, that one of them has gone; and only then."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeline.heartbeat import Heartbeat

HOSTS = ["north", "north", "south", "south"]
QUICK = {"interval": 0.1, "patience": 3.0}


class Beating:
    """Heartbeats of the given ranks in this process, each with a connection of its own, and whom they lost."""

    def __init__(self, *ranks: int) -> None:
        self.lost: dict[int, tuple[str, int]] = {}
        self.told = threading.Event()
        self.served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.beats = {rank: self.start(rank) for rank in ranks}

    def start(self, rank: int) -> Heartbeat:
        def leave(reason: str, code: int) -> None:
            self.lost[rank] = reason, code
            self.told.set()

        store = dist.TCPStore("127.0.0.1", self.served.port, is_master=False, timeout=timedelta(seconds=5))
        return Heartbeat(store, rank, HOSTS, leave=leave, **QUICK)

    def stop(self) -> None:
        for beat in self.beats.values():
            beat.stop()


@pytest.fixture
def beating() -> Beating:
    return Beating(0, 1, 2, 3)


def test_while_all_beat_nobody_leaves(beating: Beating) -> None:
    assert not beating.told.wait(2 * QUICK["patience"])
    beating.stop()


def test_rank_0_notices_whoever_stands_still_and_tells_all(beating: Beating) -> None:
    beating.beats[2].stop()
    start = time.monotonic()
    assert beating.told.wait(10)
    assert time.monotonic() - start >= QUICK["patience"] / 2
    time.sleep(1)
    beating.stop()
    assert beating.lost == dict.fromkeys((0, 1, 3), ("nothing has been heard of south (rank 2) for 3 s", 75))


def test_the_others_notice_that_rank_0_has_gone(beating: Beating) -> None:
    beating.beats[0].stop()
    assert beating.told.wait(10)
    time.sleep(1)
    assert beating.lost == dict.fromkeys((1, 2, 3), ("nothing has been heard of north (rank 0) for 3 s", 75))


def test_a_rank_that_failed_is_no_reason_to_try_again(beating: Beating) -> None:
    beating.beats[3].fail()
    beating.beats[3].stop()
    assert beating.told.wait(10)
    time.sleep(1)
    beating.stop()
    assert {code for _, code in beating.lost.values()} == {1}


def test_a_store_that_has_gone_is_rank_0_that_has_gone(beating: Beating) -> None:
    beating.beats[0].stop()
    del beating.served
    assert beating.told.wait(10)
    time.sleep(1)
    assert set(beating.lost) == {1, 2, 3}


def test_after_the_end_of_a_run_ranks_leave_in_any_order(beating: Beating) -> None:
    beating.stop()
    del beating.served
    assert not beating.told.wait(2 * QUICK["patience"])
