"""The stage store: whole or absent, noticed when damaged, bit for bit when read back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.adapters.lora import Factors
from pipeline.stages import StageStore, learnt_key, stage_key

ROOT = Path(__file__).resolve().parents[2]
KEY = stage_key(None, {"seed": 1})
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def publish(store, index=1, task="agnews", key=KEY, **changes):
    content = {
        "trained": {
            "encoder.q.A": torch.randn(2, 8, generator=torch.manual_seed(index)),
            "scale": torch.ones(()),
        },
        "method_name": "inclora",
        "method_tensors": {"basis": torch.eye(3)},
        "method_state": {"ranks": [1, 2], "energy": 0.95},
        "method_influences": {"energy": 0.95},
        "info": {"recipe": {"seed": 1}, "versions": {"torch": torch.__version__}},
    }
    return store.publish(index, task, key, **content | changes)


def raw(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def leftovers(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = torch.Size(shape).numel()
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype).reshape(shape)
    size = count * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))  # any bits: NaN payloads, negative zeros, infinities
    empty = torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if size else empty


@many
@given(
    trained=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), tensors(), max_size=4),
    memory=st.dictionaries(st.text("abc.", min_size=1, max_size=8), tensors(), max_size=3),
)
def test_tensors_come_back_bit_for_bit(tmp_path_factory, trained, memory):
    store = StageStore(tmp_path_factory.mktemp("stages"))
    trained = {name: tensor for name, tensor in trained.items() if name != "__metadata__"}
    publish(store, trained=trained, method_tensors=memory)
    stage = store.find(1, KEY)
    assert stage is not None
    for given_, loaded in ((trained, stage.load_trained()), (memory, stage.load_method("inclora")[0])):
        assert {name: raw(t) for name, t in given_.items()} == {name: raw(t) for name, t in loaded.items()}


def test_views_and_shared_storage_are_written_as_what_they_show(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    trained = {"whole": base, "again": base, "transposed": base.T, "part": base[1:, :2], "row": base[2]}
    publish(StageStore(tmp_path), trained=trained)
    loaded = StageStore(tmp_path).find(1, KEY).load_trained()
    assert {name: t.tolist() for name, t in loaded.items()} == {name: t.tolist() for name, t in trained.items()}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@many
@given(
    state=st.dictionaries(st.text(), json_values, max_size=4),
    info=st.dictionaries(st.text(), json_values, max_size=4),
)
def test_plain_values_come_back(tmp_path_factory, state, info):
    store = StageStore(tmp_path_factory.mktemp("stages"))
    publish(store, method_state=state, info=info)
    stage = store.find(1, KEY)
    assert (stage.load_method("inclora")[1], stage.info) == (state, info)


def test_changing_what_was_loaded_leaves_the_stage_alone(tmp_path):
    store = StageStore(tmp_path)
    publish(store).load_trained()["encoder.q.A"].zero_()
    assert store.find(1, KEY).load_trained()["encoder.q.A"].abs().sum() > 0


def test_a_stage_knows_its_methods(tmp_path):
    stage = publish(StageStore(tmp_path))
    assert stage.has_method("inclora", {"energy": 0.95})
    assert not stage.has_method("inclora", {"energy": 0.9}), "equal training, another memory"
    assert not stage.has_method("seqlora", {"energy": 0.95})


def test_find_gives_only_the_stage_of_that_index_and_key(tmp_path):
    store = StageStore(tmp_path / "stages")
    assert store.find(1, KEY) is None
    assert not store.root.exists()  # looking makes nothing
    publish(store)
    second = publish(store, 2, "amazon", stage_key(KEY, {}))
    found = store.find(2, second.key)
    assert (found, found.task, found.index) == (second, "amazon", 2)
    assert store.find(1, second.key) is None
    assert store.find(2, KEY) is None


def test_what_is_published_stays_as_it_is(tmp_path):
    store = StageStore(tmp_path)
    first = publish(store, info={"version": 1})
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    second = publish(store, info={"version": 2})
    assert (second, second.info) == (first, {"version": 1})
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("task", ["../../outside", "a/b", "", ".", "-", "naïve täsk\n", "x" * 300, "nul\0"])
def test_any_task_name_stays_inside_the_store(tmp_path, task):
    store = StageStore(tmp_path / "run" / "stages")
    stage = publish(store, task=task)
    assert stage.path.parent == store.root
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert store.find(1, KEY).task == task


@given(influences=st.dictionaries(st.text(), json_values, min_size=1), previous=st.none() | st.just(KEY))
def test_the_key_depends_on_all_influences_and_not_on_their_order(influences, previous):
    key = stage_key(previous, influences)
    assert key == stage_key(previous, dict(reversed(influences.items())))
    assert len(key) == 64
    others = [stage_key(stage_key(None, {}), influences), stage_key(previous, influences | {"\0more": 0})]
    changed = influences | {next(iter(influences)): ["another value", influences]}
    assert key not in [*others, stage_key(previous, changed)]


def test_keys_that_json_would_change_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="no string"):
        stage_key(None, {"rank": {1: 2}})
    with pytest.raises(AssertionError, match="no string"):
        publish(StageStore(tmp_path), method_state={"ranks": [{1: 8}]})


@many
@given(data=st.data())
def test_a_changed_byte_anywhere_is_noticed(tmp_path, data):
    store = StageStore(tmp_path)
    stage = publish(store)
    path = data.draw(st.sampled_from(sorted(path for path in stage.path.rglob("*") if path.is_file())))
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    with pytest.raises(UserError) as caught:
        store.find(1, KEY)
    assert str(stage.path / path.relative_to(stage.path)) in str(caught.value)
    assert f"delete the folder {stage.path} " in str(caught.value)
    path.write_bytes(content)
    assert store.find(1, KEY) == stage


FILES = (
    "trained/factors.safetensors",
    "method/inclora/state.safetensors",
    "method/inclora/state.json",
    "stage.json",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [None, 0, 20])
def test_a_missing_or_truncated_file_is_named(tmp_path, name, keep):
    store = StageStore(tmp_path)
    path = publish(store).path / name
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[:keep])
    with pytest.raises(UserError, match=f"{name}.*delete the folder"):
        store.find(1, KEY)
    with pytest.raises(UserError, match=f"{name}.*delete the folder"):
        publish(store)  # nor is it taken for published


def test_a_stage_under_another_stages_name_is_refused(tmp_path):
    store = StageStore(tmp_path)
    stage = publish(store)
    stage.path.rename(stage.path.with_name(stage.path.name.replace("01-", "02-")))
    with pytest.raises(UserError, match="belongs to another stage"):
        store.find(2, KEY)


def test_clean_removes_leftovers_alone(tmp_path):
    store = StageStore(tmp_path)
    store.clean()
    stage = publish(store)
    (tmp_path / ".tmp-123-abc" / "trained").mkdir(parents=True)
    store.clean()
    assert list(tmp_path.iterdir()) == [stage.path]


def test_an_interrupted_publish_leaves_nothing(tmp_path):
    class Unreadable(dict):
        def items(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(StageStore(tmp_path), method_tensors=Unreadable())
    assert list(tmp_path.iterdir()) == []


def test_everything_is_durable_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, at_rename = [], []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(source, target):
        everything = {source, *Path(source).rglob("*")}
        at_rename.append((everything - set(synced), len(everything)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    publish(StageStore(tmp_path))
    assert at_rename == [(set(), 8)]  # four files, three folders and the stage's own
    assert synced[-1] == tmp_path


def test_a_store_under_a_file_is_the_users_fault(tmp_path):
    (tmp_path / "run").write_text("a file where a folder belongs")
    with pytest.raises(UserError, match=r"cannot be written.*output\.dir=FOLDER"):
        publish(StageStore(tmp_path / "run" / "stages"))


# --- adopting ---


def test_a_stage_is_adopted_from_a_sibling_run(tmp_path):
    theirs = publish(StageStore(tmp_path / "a"))
    mine = StageStore(tmp_path / "b")
    adopted = mine.adopt(tmp_path / "a", 1, KEY, "inclora", {"energy": 0.95})
    assert adopted == mine.find(1, KEY) == mine.adopt(tmp_path / "a", 1, KEY, "inclora", {"energy": 0.95})
    assert (adopted.path / FILES[0]).stat().st_ino == (theirs.path / FILES[0]).stat().st_ino
    expected = {name: raw(t) for name, t in theirs.load_trained().items()}
    shutil.rmtree(theirs.path)
    assert {name: raw(t) for name, t in mine.find(1, KEY).load_trained().items()} == expected
    assert leftovers(mine.root) == []


def test_a_stage_is_adopted_across_file_systems(tmp_path):
    shared_memory = Path("/dev/shm")
    if not os.access(shared_memory, os.W_OK) or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no second file system that can be written here")
    other = shared_memory / f"test-stages-{os.getpid()}"
    try:
        publish(StageStore(other))
        adopted = StageStore(tmp_path / "b").adopt(other, 1, KEY, "inclora", {"energy": 0.95})
        assert adopted == StageStore(tmp_path / "b").find(1, KEY)
        assert adopted.load_trained().keys() == {"encoder.q.A", "scale"}
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_nothing_is_adopted_where_no_whole_stage_is(tmp_path):
    mine = StageStore(tmp_path / "b")
    assert mine.adopt(tmp_path / "a", 1, KEY, "inclora", {"energy": 0.95}) is None
    stage = publish(StageStore(tmp_path / "a"))
    assert mine.adopt(tmp_path / "a", 2, KEY, "inclora", {"energy": 0.95}) is None
    assert mine.adopt(tmp_path / "a", 1, KEY, "seqlora", {}) is None, "a stage without this method's memory"
    assert mine.adopt(tmp_path / "a", 1, KEY, "inclora", {"energy": 0.9}) is None, "nor with another memory of it"
    (stage.path / FILES[1]).write_bytes(b"damaged")
    assert mine.adopt(tmp_path / "a", 1, KEY, "inclora", {"energy": 0.95}) is None
    assert not mine.root.exists() or leftovers(mine.root) == []


# --- killed, and out of space ---

PUBLISHING = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from data_prep.errors import UserError
from pipeline.stages import StageStore, stage_key

torch.set_num_threads(1)
root, seed = Path(sys.argv[1]), int(sys.argv[2])
store, key = StageStore(root), lambda i: stage_key(None, {"i": i})

def publish(i):
    tensors = {"w": torch.full((100_000,), float(i))}
    store.publish(i, f"task {i}", key(i), trained=tensors, method_name="m", method_tensors=tensors,
                  method_state={"i": i}, method_influences={}, info={"i": i})

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child

def check(i):
    stage = store.find(i, key(i))  # raises on a stage that is there and not whole
    if stage is not None:
        assert stage.load_trained()["w"].tolist() == [float(i)] * 100_000
        assert stage.load_method("m")[1] == {"i": i}
    return stage is not None
"""

KILLED_AT_RANDOM = (
    PUBLISHING
    + """
random.seed(seed)
whole = leftovers = first = 0
start = time.monotonic()
os.waitpid(in_child(lambda: publish(0)), 0)
publish_s, whole, first = time.monotonic() - start, 1, 1  # as slow as this machine just is
for _ in range(16):
    def loop():
        for i in range(first, first + 1000):
            publish(i)
    child = in_child(loop)
    time.sleep(random.uniform(0.0, 4 * publish_s))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while check(first):
        whole, first = whole + 1, first + 1
    leftovers += sum(p.name.startswith(".tmp-") for p in root.glob(".tmp-*"))
    store.clean()
    assert len(list(root.glob("*"))) == whole, "a name that is no whole stage"
print(json.dumps({"whole": whole, "leftovers": leftovers}))
"""
)

KILLED_AT_EACH_STEP = (
    PUBLISHING
    + """
def killed_at(step):
    def work():
        seen = [0]
        def hook(event, arguments):
            if event in ("open", "os.rename", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree"):
                seen[0] += 1
                if seen[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        publish(1)
    _, status = os.waitpid(in_child(work), 0)
    return os.WIFSIGNALED(status)

found = []
for step in range(1, 200):
    killed = killed_at(step)
    found.append(check(1))
    store.clean()
    if not killed:
        break
    for stage in root.glob("01-*"):
        import shutil
        shutil.rmtree(stage)
print(json.dumps(found))
"""
)


def run_script(script, *arguments, before=()):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*before, sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_at_any_moment_leaves_whole_stages_alone(tmp_path):
    seen = run_script(KILLED_AT_RANDOM, tmp_path / "stages", 5)
    assert seen["whole"] > 3
    assert seen["leftovers"] > 3  # so the kills did hit a publish


def test_a_run_killed_at_each_step_of_publishing_leaves_a_whole_stage_or_none(tmp_path):
    found = run_script(KILLED_AT_EACH_STEP, tmp_path / "stages", 0)
    assert len(found) > 10
    assert found == sorted(found)  # none up to the rename, whole from there on
    assert (found[0], found[-1]) == (False, True)


OUT_OF_SPACE = (
    PUBLISHING
    + """
import resource
messages = []
kind, limits = sys.argv[3], [1, 20, 200, 392, 400, 600, 784, 1500]  # KiB; a stage takes about 800
if kind == "limit":
    limits = [1, 200, 390, 1500]
for limit in limits:
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit * 1024, resource.RLIM_INFINITY))
    else:
        assert os.system(f"mount -o remount,size={limit}k {root}") == 0
    try:
        publish(1)
        messages.append(None)
    except UserError as error:
        messages.append(str(error))
        assert os.listdir(root) == [], os.listdir(root)
assert check(1)
print(json.dumps(messages))
"""
)


def check_messages(messages):
    assert messages[-1] is None
    for message in messages[:-1]:
        assert "no space left on device" in message
        assert "free some space and run the same command again" in message


def test_a_file_size_limit_is_told_and_leaves_nothing(tmp_path):
    check_messages(run_script(OUT_OF_SPACE, tmp_path, 0, "limit"))


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    in_namespace = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size=1k none {tmp_path}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*in_namespace, "sh", "-c", mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to mount a small tmpfs in a namespace of its own here")
    messages = run_script(
        OUT_OF_SPACE, tmp_path, 0, "disk", before=[*in_namespace, "sh", "-c", f'{mount} && "$0" "$@"']
    )
    check_messages(messages)
    assert len(messages) == 8


def factors(seed: int, scale: float = 2.0) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(2, 3, generator=draw), torch.randn(4, 2, generator=draw), scale)


def test_equal_models_have_equal_keys_and_others_do_not() -> None:
    def key(updates: Any = None, matrices: Any = None, others: Any = None) -> str:
        return learnt_key(updates or {}, matrices or {}, others or {})

    two = {"a": [factors(1), factors(2)], "b": [factors(3)]}
    same = key({"b": [factors(3)], "a": [factors(1), factors(2)]})
    assert key(two) == same, "whatever their order and place in memory"
    W = torch.ones(2, 2)
    different = [
        key(),
        same,
        key({"a": [factors(2), factors(1)], "b": [factors(3)]}),
        key({"a": [factors(1)], "b": [factors(2), factors(3)]}),
        key({"a": [factors(1), factors(2, scale=1.0)], "b": [factors(3)]}),
        key(matrices={"a": W}),
        key(others={"a": W}),
        key(matrices={"a": W.half()}),
        key(matrices={"a": W.reshape(4, 1)}),
        key(matrices={"a": torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-23]])}),
    ]
    assert len(set(different)) == len(different)
