"""The published orders, and suggestions for unknown names."""

import json

import pytest

from data_prep.errors import UserError
from data_prep.orders import ORDERS, near_name, order_tasks


def test_orders_one_to_three_run_four_tasks():
    assert order_tasks("order1") == ("dbpedia", "amazon", "yahoo", "agnews")
    assert order_tasks("order2") == ("dbpedia", "amazon", "agnews", "yahoo")
    assert order_tasks("order3") == ("yahoo", "amazon", "agnews", "dbpedia")


def test_five_task_streams_have_yelp_after_amazon():
    assert order_tasks("order1_5task") == ("dbpedia", "amazon", "yelp", "yahoo", "agnews")
    assert order_tasks("order2_5task") == ("dbpedia", "amazon", "yelp", "agnews", "yahoo")
    assert order_tasks("order3_5task") == ("yahoo", "amazon", "yelp", "agnews", "dbpedia")


def test_long_orders_are_permutations_of_fifteen_tasks():
    assert len(ORDERS) == 9
    for name in ("order4", "order5", "order6"):
        assert sorted(order_tasks(name)) == sorted(ORDERS["order4"])
        assert len(set(order_tasks(name))) == 15
    assert [ORDERS[name][0] for name in ("order4", "order5", "order6")] == ["MNLI", "MultiRC", "yelp"]
    assert [ORDERS[name][-1] for name in ("order4", "order5", "order6")] == ["yahoo", "yahoo", "WiC"]


def test_published_configs_agree_with_the_orders(mini_dir):
    published = json.loads((mini_dir / "configs" / "orders.json").read_text(encoding="utf-8"))["orders"]
    for name in ("order1", "order2", "order3", "order4", "order5", "order6"):
        assert tuple(published[name]) == ORDERS[name]


def test_unknown_order_names_the_nearest_and_all():
    with pytest.raises(UserError, match=r'no order "order11"; known orders: order1, .*; did you mean "order1"\?$'):
        order_tasks("order11")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("agnew", "agnews"), ("imdb", "IMDB"), ("SST2", "SST-2"), ("Yahoo", "yahoo")],
)
def test_near_name_ignores_case_and_small_slips(name, suggestion):
    assert near_name(name, ORDERS["order4"]) == f'; did you mean "{suggestion}"?'


def test_nothing_near_gives_no_suggestion():
    assert near_name("weather", ORDERS["order4"]) == ""
