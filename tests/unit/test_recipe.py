"""Recipes: every shipped one loads, every fault is told at once, overrides and paths resolve as documented."""

import copy
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.orders import ORDERS
from pipeline.deepspeed_config import zero_file
from pipeline.recipe import Recipe
from pipeline.recipe_groups import Group
from pipeline.recipe_paths import expand_path
from pipeline.recipe_source import ROOT, apply_override, changed_keys, split_override
from pipeline.recipe_yaml import parse_yaml

SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
MINIMAL = {
    "model": {"family": "t5", "path": "synthetic"},
    "data": {"path": "synthetic"},
    "order": {"tasks": ["notes", "letters"]},
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
        raw["training"]["per_task"] = {"noted": {"epochs": 2}}
        raw["method"]["name"] = "inclor"
        raw["seed"] = -1
        raw["order"]["tasks"] = ["notes", "leters"]
        raw["data"]["tasks"] = {"a/b": {"labels": ["Hot", "Cold"], "train": "${A}", "test": "${B}/x"}}
        raw["output"] = {"dir": "${HOME}"}

    with pytest.raises(UserError) as caught:
        Recipe.load(write(break_it))
    message = str(caught.value)
    assert "11 problems" in message
    assert 'order.tasks[1]: no task "leters"; did you mean "letters"?' in message
    assert 'training.per_task.noted: no task "noted"; the order has notes, leters; did you mean "notes"?' in message
    assert "data.tasks.a/b: 'a/b' cannot name a task" in message
    assert "data.tasks.a/b.train: ${A} is not expanded; legal are CL_BENCHMARK_DIR" in message
    assert "data.tasks.a/b.test: ${B} is not expanded" in message
    assert "output.dir: ${HOME} is not expanded" in message
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
        ({"order": {"tasks": ["notes", "letters", "notes"]}}, "names a task twice (notes)"),
        (
            {"training": {"per_task": {"leters": {"epochs": 2}}}},
            'training.per_task.leters: no task "leters"; the order has notes, letters; did you mean "letters"?',
        ),
        ({"order": {"tasks": ["notes", "letter"]}}, 'order.tasks[1]: no task "letter"; did you mean "letters"?'),
        (
            {"order": {"tasks": ["agnews"]}},
            'order.tasks[0]: no task "agnews"; there are counts, letters, lists, notes;',
        ),
        (
            {"method": {"name": "mtl"}, "training": {"per_task": {"notes": {"learning_rate": 0.1}}}},
            "training.per_task.notes.learning_rate: mtl trains the rows of all tasks together, at one rate",
        ),
        ({"evaluation": {"unseen": ["letters"]}}, "evaluation.unseen: letters is in the order, so it is seen"),
        ({"evaluation": {"unseen": ["lists", "lists"]}}, "evaluation.unseen: lists stands there twice"),
        ({"evaluation": {"unseen": ["list"]}}, 'evaluation.unseen[0]: no task "list"; did you mean "lists"?'),
        (
            {"adapter": {"kind": 5}},
            "adapter.kind: '5' is no kind of adapter; legal: lora, triplet, bottleneck, prompt, prefix",
        ),
        ({"adapter": {"kind": "promt"}}, "adapter.kind: 'promt' is no kind of adapter; did you mean \"prompt\"?"),
        ({"adapter": {"kind": "prompt", "rank": 8}}, "adapter.rank: no such key; legal here: kind, length"),
        ({"adapter": {"kind": "prompt"}}, "adapter.kind: prompt is one module through the stream, and inclora needs"),
        ({"method": {"name": "pegp", "energy": 1.2}}, "method.energy: 1.2 is not in (0, 1]"),
        ({"method": {"name": "pegp", "energy": 0}}, "method.energy: 0.0 is not in (0, 1]"),
        ({"method": {"name": "pegp", "feature_samples": 0}}, "method.feature_samples: 0 is not greater than 0"),
        ({"method": {"name": "pegp", "enrgy": 0.9}}, 'method.enrgy: no such key; did you mean "energy"?'),
        (
            {
                "method": {"name": "pegp"},
                "adapter": {"kind": "prefix"},
                "engine": {"gradient_checkpointing": True},
            },
            "engine.gradient_checkpointing: true recomputes layers without the cache that holds the prefix",
        ),
        ({"model": {"family": "t5", "path": ["x"] * 99}}, "model.path: ['x', 'x', "),
        ({"output": {"dir": ""}}, "output.dir: ''"),
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
        ("seed: 1\n[1]: 2\n", "line 2: a key is a word"),
        ("seed: 1\n{a: 1}: 2\n", "line 2: a key is a word"),
        ("seed: 1\n1: 2\n", 'line 2: the key 1 reads as 1; write "1"'),
        ("data:\n  tasks:\n    yes: 2\n", 'line 3: the key yes reads as True; write "yes"'),
        ("seed: 1\n~: 2\n", "line 2: the key ~ reads as None"),
        ("1.5: 2\n", "line 1: the key 1.5 reads as 1.5"),
        ("2020-01-01: 2\n", "2020-01-01: no such key"),
        ("seed: 2020-01-01\n", "seed: '2020-01-01'"),
        ("seed: 2020-99-99\n", "seed: '2020-99-99'"),
        ("a: 1\nb: &x [*x]\n", "line 2: *x stands inside what it names"),
        ("a: 1\nb: &x {c: {d: *x}}\n", "line 2: *x stands inside what it names"),
        ("a: 1\nb: " + "[" * 3000 + "]" * 3000, "line 2: nested more than 50 deep"),
        ("a: 1\nseed: " + "1" * 5000, "line 2: '1111"),
        ("seed: 0x" + "f" * 5000, "line 1: '0xffff"),
        ("seed: 99999999999999999999\n", "is no legal int"),
        ("seed: !!int one\n", "line 1: 'one' is no legal int"),
        ("seed: !!bool one\n", "line 1: 'one' is no legal bool"),
        ("seed: !!timestamp one\n", "line 1, column 7: not valid YAML"),
        ("a: 1\nseed: !!python/name:os.system x\n", "line 2, column 7: not valid YAML"),
        ('a: "\\ud800"\n', "line 1: "),
        ('a: 1\nb: "\\Uffffffff"\n', "line 2: not valid YAML"),
        ("a: 1\nb: \x01\n", "line 2: not valid YAML"),
        ("seed: 1e999\n", "seed: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


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
    assert Recipe.load(path, ["order=order2", "order.tasks=[lists, notes]"]).task_names == ("lists", "notes")


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
    in_file = write(lambda raw: raw.update(data={"path": "here"}, order={"name": "order1"}))
    assert Recipe.load(in_file).data.path == str(ROOT / "here")
    assert Recipe.load(in_file, ["data.path=here"]).data.path == str(tmp_path / "here")
    assert Recipe.load(in_file, ["data.path=elsewhere"]).data.path == str(ROOT / "elsewhere")
    assert Recipe.load(in_file, ["output.dir=out"]).run_dir == tmp_path / "out"


def test_a_path_in_a_group_given_whole_is_the_command_lines_too(write, monkeypatch, tmp_path: Path) -> None:
    benchmark(tmp_path / "here", "kettles")
    monkeypatch.chdir(tmp_path)
    own = "{labels: [Hot, Cold], train: here, test: there}"
    recipe = Recipe.load(
        write(),
        [
            "data={path: here}",
            f"data.tasks.mine={own}",
            "model={family: t5, path: here}",
            "output={dir: new}",
            "order=[mine, kettles]",
        ],
    )
    assert (recipe.data.path, recipe.model.path) == (str(tmp_path / "here"), str(tmp_path / "here"))
    assert recipe.run_dir == tmp_path / "new"
    assert (recipe.data.tasks["mine"].train, recipe.data.tasks["mine"].test) == (
        str(tmp_path / "here"),
        str(ROOT / "there"),
    )


def test_variables_are_expanded_in_the_run_folder(write, monkeypatch) -> None:
    monkeypatch.setenv("CL_MODEL_DIR", "/models")
    assert Recipe.load(write(), ["output.dir=${CL_MODEL_DIR}/run"]).run_dir == Path("/models/run")
    with pytest.raises(UserError, match=r"output\.dir: \$\{HOME\} is not expanded; legal are CL_BENCHMARK_DIR, "):
        Recipe.load(write(), ["output.dir=${HOME}/run"])


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "x" * 5000, "a\0b", "${CL_MODEL_DIR:?x}/y"])
@pytest.mark.parametrize("field", ["data.path", "model.path", "output.dir", "data.tasks.mine.train"])
def test_what_cannot_be_a_path_is_told_at_its_key(write, field: str, path: str) -> None:
    def change(raw):
        raw["data"]["tasks"] = {"mine": {"labels": ["Hot", "Cold"], "train": "a.csv", "test": "b.csv"}}
        apply_override(raw, field, path)

    with pytest.raises(UserError, match=rf"1 problem\n  {field}: ") as caught:
        Recipe.load(write(change))
    assert len(str(caught.value)) < 400


def test_own_tasks_need_no_data_path_and_others_do(write) -> None:
    def change(raw):
        del raw["data"]["path"]
        raw["data"]["tasks"] = {"mine": {"labels": ["Hot", "Cold"], "train": "a.csv", "test": "b.csv"}}
        raw["order"] = {"tasks": ["mine"]}

    path = write(change)
    recipe = Recipe.load(path)
    assert recipe.data.path is None
    with pytest.raises(UserError, match=r"1 problem\n  data\.path: missing \(dbpedia is not under data\.tasks\); name"):
        Recipe.load(path, ["order.tasks=[mine, dbpedia]"])
    with pytest.raises(UserError, match=r"data\.path: missing \(dbpedia, amazon, yahoo, agnews are not"):
        Recipe.load(path, ["order=order1"])
    with pytest.raises(UserError, match=r'1 problem\n  order\.tasks\[0\]: no task "mines"; did you mean "mine"\?$'):
        Recipe.load(path, ["order.tasks=[mines]"])
    with pytest.raises(UserError, match=r"data\.path: missing; name"):
        Recipe.load(write(lambda raw: raw.update(data={}, order={"name": "order11"})))


def benchmark(folder: Path, *names: str) -> None:
    """A folder in which tasks of these names can be found."""
    for name in names:
        (folder / "CL_Benchmark" / "TC" / name).mkdir(parents=True)
        (folder / "CL_Benchmark" / "TC" / name / "labels.json").write_text('["Hot", "Cold"]')


def test_tasks_are_those_of_the_folder_of_the_benchmark_and_ones_own(write, tmp_path: Path) -> None:
    path = write(lambda raw: raw["data"].update(path=str(tmp_path / "data")))
    with pytest.raises(UserError) as caught:
        Recipe.load(path, ["order.tasks=[kettles, agnew]"])
    assert str(caught.value).splitlines()[1:] == [
        f"  data.path: {tmp_path}/data does not exist; name the folder that holds CL_Benchmark/, or "
        "CL_Benchmark itself",
        '  order.tasks[1]: no task "agnew"; did you mean "agnews"?',
    ]
    assert Recipe.load(path, ["order=order1"]).task_names == ORDERS["order1"], "nothing is read yet"
    benchmark(tmp_path / "data", "kettles")
    assert Recipe.load(path, ["order.tasks=[kettles, agnews]"]).task_names == ("kettles", "agnews")
    with pytest.raises(UserError, match=r'1 problem\n  order\.tasks\[0\]: no task "clouds"; there are .*, kettles, '):
        Recipe.load(path, ["order.tasks=[clouds]"])


@pytest.mark.parametrize("name", ["../up", "a/b", "", "-a", "a b", "ü", "x" * 65, "untrained"])
def test_a_task_is_named_as_files_can_be(write, name: str) -> None:
    task = {"labels": ["Hot", "Cold"], "train": "a.csv", "test": "b.csv"}

    def load(name: str) -> Recipe:
        return Recipe.load(
            write(lambda raw: raw.update(data={"tasks": {name: task}}, order={"tasks": [name]})),
        )

    with pytest.raises(UserError, match=r"1 problem\n  data\.tasks.*(cannot name a task|is reserved)"):
        load(name)
    assert load("v1.0_a+B-c").task_names == ("v1.0_a+B-c",)


@pytest.mark.parametrize(
    ("labels", "words"),
    [("[yes, no]", 'write the word in quotes, "yes"'), ("[up, off]", '"no"'), ("[1, 2]", 'write it in quotes, "1"')],
)
def test_labels_that_yaml_reads_as_something_else_want_quotes(write, labels: str, words: str) -> None:
    own = f"{{labels: {labels}, train: a.csv, test: b.csv}}"
    with pytest.raises(UserError, match=r"data\.tasks\.mine\.labels\[\d\]: \w+ is not text; ") as caught:
        Recipe.load(write(), [f"data.tasks.mine={own}"])
    assert words in str(caught.value)


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
    assert changed_keys(["zero=3", "output.dir=x", "engine.zero=1", "order=order2"]) == ["zero1", "order2"]


DIFFERENT = [
    "training.epochs=3",
    "training.per_task.dbpedia.epochs=3",
    "training.per_task.yahoo.epochs=3",
    "model.path=x",
    "data.path=x",
    "order.tasks=[x]",
    "data.tasks={x: 1}",
    "batching.order=random",
    "order=random",
    "data.tasks.a.family=t5",
    "data.tasks.b.family=t5",
    "model.family=t5",
    *(f"order.tasks=[{', '.join(tasks)}]" for name, tasks in ORDERS.items() if len(tasks) > 6),
]


def test_different_overrides_name_different_folders() -> None:
    names = ["-".join(changed_keys([text])) for text in DIFFERENT]
    assert len(set(names)) == len(names), names
    assert all(len(name) <= 40 for name in names)


def test_a_key_of_several_groups_is_named_with_its_group() -> None:
    fields = [(group, key) for group, key in leaves() if group != "seed"]
    unnamed = {("output", "dir"), ("evaluation", "references"), ("evaluation", "retention")}
    words = {changed_keys([f"{group}.{key}=1"])[0] for group, key in fields if (group, key) not in unnamed}
    assert len(words) == len(fields) - len(unnamed) - len({"method.name", "order.name"}) + 1, (
        "those two are named by their values"
    )


@given(st.lists(st.sampled_from(DIFFERENT), unique=True), st.lists(st.sampled_from(DIFFERENT), unique=True))
def test_names_of_many_overrides_stay_short_and_different(one: list[str], other: list[str]) -> None:
    names = ["-".join(changed_keys(overrides)) for overrides in (one, other)]
    last_wins = [list(dict(text.split("=") for text in overrides).items()) for overrides in (one, other)]
    assert all(len(name) <= 110 for name in names)
    assert (names[0] == names[1]) is (last_wins[0] == last_wins[1])


SAME = [
    "zero=3",
    "engine.offload=optimizer",
    "engine.gradient_checkpointing=true",
    "training.micro_batch_size=1",
    "output.dir=x",
    "evaluation.batch_size=1",
    "model.path=google-t5/t5-small",
    "data.path=${CL_BENCHMARK_DIR:-/}",
    "adapter.kind=lora",
    "method=pegp method.feature_drift=true",
    "evaluation.references=[runs/alone]",
    "evaluation.retention=[essays.txt]",
]
OTHER = [
    "seed=1",
    "model.family=llama2",
    "model.revision=abc",
    "method=seqlora",
    "order=order1",
    "order.tasks=[letters, notes]",
    "adapter.rank=2",
    "adapter.alpha=2",
    "adapter.dropout=0",
    "adapter.target_modules=all_linear",
    "training.epochs=2",
    "training.max_steps=2",
    "training.learning_rate=2",
    "training.schedule=cosine",
    "training.global_batch_size=8",
    "training.adam_eps=1e-4",
    "training.weight_decay=0.1",
    "training.warmup_steps=2",
    "training.gradient_clipping=0",
    "training.per_task.notes.epochs=2",
    "batching.order=random",
    "evaluation.cells=full",
    "evaluation.label_scoring=false",
    "evaluation.split=validation",
    "evaluation.max_new_tokens=5",
    "evaluation.unseen=[lists]",
    "engine.precision=bf16",
    "data.max_train_rows=12",
    "data.max_test_rows=12",
    "data.max_source_tokens=99",
    "data.bad_rows=drop",
    "data.truncation=legacy",
    "data.add_task_name=false",
    "data.add_dataset_name=false",
    "data.tasks.mine={labels: [a, b], train: x, test: y}",
    "method=olora method.lambda_1=1",
    "method=olora method.lambda_2=1",
    "method=pegp method.mode=literal",
    "method=pegp method.project=gradient",
    "method=pegp method.lora=shared",
    "method=pegp method.energy=0.9",
    "method=pegp method.energy_max=0.99",
    "method=pegp method.feature_samples=8",
    "method=pegp method.max_rank=4",
    "method=pegp method.merge_beta=0.9",
    "method=pegp method.prefix_values=freeze",
    "method=pegp adapter=bottleneck",
    "method=pegp adapter=bottleneck adapter.width=8",
    "method=pegp adapter=prompt adapter.length=8",
    "model.quantization=nf4",
    "training.optimizer=adamw_8bit",
    "method=gorp method.mode=literal",
    "method=gorp method.parts=B",
    "method=gorp method.lora=per_task",
    "method=gorp method.gradient_space=mean_gradient",
    "method=gorp method.project_b=false",
    "method=gorp method.full_rank_modules=[wo]",
    "method=gorp method.full_rank_lr=1e-4",
    "method=gorp method.core_rank=4",
    "method=gorp method.core_scale=2",
    "method=gorp method.refresh_every=5",
    "method=gorp method.refresh_moments=keep",
    "method=gorp method.svd=exact",
    "method=lbcl method.mode=literal",
    "method=lbcl method.project=off",
    "method=lbcl method.project=gradient method.projection=sum",
    "method=lbcl method.init=copy",
    "method=lbcl method.align=hungarian",
    "method=lbcl method.sensitivity=per_sample",
    "method=lbcl method.seed_samples=4",
    "method=lbcl method.layers=top_1",
    "method=lbcl method.gamma=0",
    "method=lbcl method.sigma_lr=1e-4",
    "method=lbcl adapter.rank=4",
    "method=lbcl adapter.scale=1",
]
ONE_VALUE = {"evaluation.decoding"}


def leaves() -> set[tuple[str, str]]:
    """(group, key) of every key of a recipe, `seed` as a group of itself."""
    keys = set()
    for group, field in Recipe.model_fields.items():
        kind = field.annotation
        members = [kind, *get_args(kind)]  # of a union, such as the methods
        groups = [member for member in members if isinstance(member, type) and issubclass(member, Group)]
        keys |= {(group, key) for member in groups for key in member.model_fields} or {(group, "")}
    return keys


def test_every_key_that_has_a_choice_is_known_to_influence_results_or_not() -> None:
    short = {"zero": "engine.zero", "method": "method.name", "order": "order.name"}
    keys = {(text.split(" ")[-1] if text.startswith("method=") else text).partition("=")[0] for text in SAME + OTHER}
    tried = {short.get(key, key) for key in keys} | ONE_VALUE
    untried = {f"{group}.{key}".strip(".") for group, key in leaves()} - {".".join(key.split(".")[:2]) for key in tried}
    assert not untried


@pytest.mark.parametrize("override", SAME)
def test_what_does_not_influence_results_keeps_the_recipe_the_same(write, override: str) -> None:
    # the order is the benchmark's, so that its folder need not be there
    path = write(lambda raw: raw.update(order={"name": "order1"}))
    *before, _ = override.split()
    assert Recipe.load(path, override.split()).sha256 == Recipe.load(path, before).sha256


@pytest.mark.parametrize("override", OTHER)
def test_what_influences_results_makes_another_recipe(write, override: str) -> None:
    path, given = write(), override.split(" ") if override.startswith("method=") else [override]
    assert Recipe.load(path, given).sha256 != Recipe.load(path, given[:-1]).sha256


def test_a_bare_off_means_the_word(write) -> None:
    path = write()
    assert Recipe.load(path, ["method=pegp", "method.project=off"]).method.project == "off"
    assert Recipe.load(path, ["method=pegp", 'method.project="off"']).method.project == "off"


def test_per_task_settings_change_their_task_alone(write) -> None:
    path = write(lambda raw: raw.update(training={"epochs": 3, "per_task": {"letters": {"learning_rate": 0.5}}}))
    training = Recipe.load(path).training
    assert (training.for_task("letters").learning_rate, training.for_task("letters").epochs) == (0.5, 3)
    assert training.for_task("notes").learning_rate == 1e-3


ENGINES = [(zero, offload) for zero in range(4) for offload in ("none", "optimizer", "parameters")]
LEGAL = [*((zero, "none") for zero in range(4)), *((zero, "optimizer") for zero in (1, 2, 3)), (3, "parameters")]


@pytest.mark.parametrize(("zero", "offload"), ENGINES)
def test_every_stage_and_offload_has_its_file_or_is_refused(write, zero: int, offload: str) -> None:
    path, overrides = write(), [f"zero={zero}", f"engine.offload={offload}"]
    if (zero, offload) not in LEGAL:
        with pytest.raises(UserError, match=r"engine: .*offload"):
            Recipe.load(path, overrides)
        return
    assert zero_file(Recipe.load(path, overrides).engine).is_file()


def test_a_saved_recipe_is_read_back_exactly_as_saved(write, tmp_path: Path) -> None:
    recipe = Recipe.load(write(), ["output.dir=~/run", "seed=3"])
    path = tmp_path / "run" / "recipe.yaml"
    path.parent.mkdir()
    # as on another machine: nothing that it names need be there
    path.write_text(recipe.to_yaml().replace("path: synthetic", "path: no/such/folder").replace("notes", "stones"))
    again = Recipe.load_resolved(path)
    assert (again.output, again.seed) == (recipe.output, 3)
    assert (again.data.path, again.model.path) == ("no/such/folder", "no/such/folder")
    assert again.task_names == ("stones", "letters")
    path.write_text(recipe.to_yaml())
    assert Recipe.load_resolved(path) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("epochs: 1", "epochs: one"), "training.epochs: 'one'"),
        (lambda text: text + "new_group: {}\n", "new_group: no such key"),
        (lambda text: text + "[", "not valid YAML"),
        (lambda text: "", "a recipe is a mapping"),
    ],
)
def test_a_saved_recipe_that_cannot_be_read_is_told_with_what_to_do(write, tmp_path: Path, change, words) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(change(Recipe.load(write()).to_yaml()))
    with pytest.raises(UserError) as caught:
        Recipe.load_resolved(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert f"delete the folder {tmp_path} or choose another: output.dir=FOLDER" in message
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Recipe.load_resolved(path)
