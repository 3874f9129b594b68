"""Recipes: every shipped one loads, every fault is told at once, overrides and paths resolve as documented."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.orders import ORDERS
from pipeline.deepspeed_config import zero_file
from pipeline.recipe import Engine, Recipe
from pipeline.recipe_source import ROOT, apply_override, expand_path, parse_yaml, split_override

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = {
    "model": {"family": "t5", "path": "synthetic"},
    "data": {"path": "synthetic"},
    "order": {"tasks": ["one", "two"]},
    "method": {"name": "inclora"},
}


@pytest.fixture
def write(tmp_path: Path):
    def write(change=lambda raw: None, name: str = "own.yaml") -> Path:
        raw = copy.deepcopy(MINIMAL)
        change(raw)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(recipe.to_yaml())
    again = Recipe.load(saved)
    assert again == recipe
    assert again.sha256 == recipe.sha256


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_complete(path: Path) -> None:
    groups = yaml.safe_load(path.read_text())
    assert set(groups) >= {"model", "data", "order", "method", "adapter", "training", "evaluation", "engine", "seed"}
    assert "#" in path.read_text(), "a recipe says where its numbers come from"


def test_the_promised_recipes_are_there() -> None:
    names = {path.stem for path in SHIPPED}
    long_and_short = list(ORDERS)
    promised = {
        f"{model}_{order}" for model in ("t5_large", "llama2", "mini_t5", "mini_llama2") for order in long_and_short
    }
    promised |= {f"t5_base_order{k}" for k in (1, 2, 3)} | {"tiny_t5_order1", "tiny_llama2_order1"}
    assert promised <= names


@pytest.mark.parametrize("path", [path for path in SHIPPED if "_order" in path.stem and "tiny" not in path.stem])
def test_a_recipe_runs_the_order_in_its_name(path: Path) -> None:
    assert Recipe.load(path).order.name == path.stem[path.stem.index("order") :]


def test_all_faults_stand_in_one_message(write) -> None:
    def break_it(raw):
        raw["adapter"] = {"rank": 0}
        raw["training"] = {"epochs": "two", "learning_rat": 1e-3}
        raw["method"]["name"] = "inclor"
        raw["seed"] = -1

    with pytest.raises(UserError) as caught:
        Recipe.load(write(break_it))
    message = str(caught.value)
    assert "5 problems" in message
    assert "adapter.rank: 0 is not greater than 0" in message
    assert "training.epochs: 'two'" in message
    assert 'training.learning_rat: no such key; did you mean "learning_rate"?' in message
    assert "method.name: 'inclor' is no method; did you mean \"inclora\"?" in message
    assert "seed: -1 is less than 0" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine": {"precision": "bf16", "zero": 1}}, "use zero 2 or 3"),
        ({"engine": {"zero": 0, "offload": "optimizer"}}, "offload needs zero 1, 2 or 3"),
        ({"training": {"global_batch_size": 10, "micro_batch_size": 4}}, "no multiple of micro_batch_size"),
        ({"training": {"epochs": True}}, "training.epochs: True"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"order": {"name": "order1", "tasks": ["a"]}}, "exactly one"),
        ({"order": {"tasks": ["a", "b", "a"]}}, "names a task twice (a)"),
        ({"training": {"per_task": {"yaho": {"epochs": 2}}}}, 'did you mean "yahoo"?'),
        ({"model": {"family": "gpt", "path": "x"}}, "model.family: 'gpt' is not one of 't5' or 'llama2'"),
        ({"method": {}}, "method.name: missing"),
    ],
)
def test_a_fault_is_named_with_what_is_legal(write, change, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(write(lambda raw: raw.update(change)))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b", "a recipe is a mapping"),
        ("seed: 1\nseed: 2\n", "line 2: the key 'seed' stands twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_names_both_places(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        Recipe.load("recipes/no_such.yaml")
    assert str(tmp_path) in str(caught.value)
    assert str(ROOT) in str(caught.value)


def test_a_recipe_is_found_from_any_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("recipes/mini_t5_order1.yaml").order.name == "order1"


def test_overrides_apply_in_order_with_their_shorthands(write) -> None:
    path = write(lambda raw: raw.update(adapter={"rank": 4, "dropout": 0.5}))
    recipe = Recipe.load(path, ["zero=3", "method=seqlora", "adapter=lora", "adapter.rank=2", "order=order2", "seed=7"])
    assert recipe.engine.zero == 3
    assert recipe.method.name == "seqlora"
    assert recipe.adapter.kind == "lora"
    assert (recipe.adapter.rank, recipe.adapter.dropout) == (2, 0.1), "adapter=X replaces the group by defaults"
    assert recipe.order.name == "order2"
    assert recipe.order.tasks is None, "setting the name drops the list"
    assert recipe.seed == 7
    assert Recipe.load(path, ["order=order2", "order.tasks=[a, b]"]).task_names == ("a", "b")


@pytest.mark.parametrize("text", ["epochs", "=3", "a b=1", "training.epochs=[", "training..epochs=1"])
def test_an_override_of_no_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="override"):
        split_override(text)


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_every_way_to_write_a_number_is_a_number(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:.17g}"):
        assert float(parse_yaml(text)) == float(text)
        assert isinstance(parse_yaml(text), int | float)


@given(
    st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from("xyz"), st.integers())),
    st.sampled_from("abc"),
    st.sampled_from("xyz"),
    st.integers(),
)
def test_an_override_changes_its_key_and_nothing_else(raw, group: str, key: str, value: int) -> None:
    before = copy.deepcopy(raw)
    apply_override(raw, f"{group}.{key}", value)
    assert raw[group].pop(key) == value
    before.setdefault(group, {}).pop(key, None)
    assert raw == before


def test_only_the_three_variables_are_expanded(monkeypatch) -> None:
    monkeypatch.setenv("CL_MODEL_DIR", "/models")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.delenv("CL_BENCHMARK_DIR", raising=False)
    assert expand_path("${CL_MODEL_DIR:-../m}/mini", "model.path") == "/models/mini"
    assert expand_path("${CL_BENCHMARK_DIR:-../b}", "data.path") == "../b"
    for text in ("${SECRET}", "${CL_BENCHMARK_DIR}"):
        with pytest.raises(UserError, match=r"data\.path"):
            expand_path(text, "data.path")


def test_relative_paths_start_at_the_root_or_at_the_current_folder(write, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    in_file = write(lambda raw: raw["data"].update(path="here"))
    assert Recipe.load(in_file).data.path == str(ROOT / "here")
    assert Recipe.load(in_file, ["data.path=here"]).data.path == str(tmp_path / "here")
    assert Recipe.load(in_file, ["data.path=elsewhere"]).data.path == str(ROOT / "elsewhere")
    assert Recipe.load(in_file, ["output.dir=out"]).run_dir == tmp_path / "out"


def test_a_hub_id_stays_and_a_path_does_not(write) -> None:
    def load(path: str) -> str:
        return Recipe.load(write(lambda raw: raw["model"].update(path=path))).model.path

    assert load("google-t5/t5-large") == "google-t5/t5-large"
    assert load("./no/such") == str(ROOT / "no/such")
    assert load("synthetic") == "synthetic"


def test_the_run_folder_names_what_was_changed(write) -> None:
    path = write(name="my_recipe.yaml")
    assert Recipe.load(path).run_dir == ROOT / "runs" / "my_recipe-s42"
    recipe = Recipe.load(path, ["method=seqlora", "training.learning_rate=1e-4", "seed=3"])
    assert recipe.run_dir.name == "my_recipe-seqlora-learning_rate1e_4-s3"


SAME = ["zero=3", "engine.offload=optimizer", "training.micro_batch_size=1", "output.dir=x", "evaluation.batch_size=1"]
OTHER = [
    "seed=1",
    "training.epochs=2",
    "adapter.rank=2",
    "method=seqlora",
    "order.tasks=[two, one]",
    "engine.precision=bf16",
]


@pytest.mark.parametrize("override", SAME)
def test_what_does_not_influence_results_keeps_the_recipe_the_same(write, override: str) -> None:
    path = write()
    assert Recipe.load(path, [override]).sha256 == Recipe.load(path).sha256


@pytest.mark.parametrize("override", OTHER)
def test_what_influences_results_makes_another_recipe(write, override: str) -> None:
    path = write()
    assert Recipe.load(path, [override]).sha256 != Recipe.load(path).sha256


def test_per_task_settings_change_their_task_alone(write) -> None:
    path = write(lambda raw: raw.update(training={"epochs": 3, "per_task": {"two": {"learning_rate": 0.5}}}))
    training = Recipe.load(path).training
    assert (training.for_task("two").learning_rate, training.for_task("two").epochs) == (0.5, 3)
    assert training.for_task("one").learning_rate == 1e-3


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_stage_has_its_file(zero: int) -> None:
    assert zero_file(Engine(zero=zero)).is_file()
