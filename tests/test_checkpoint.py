"""Faults that a run must survive: each test breaks something and asks for the promise to hold."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from model.io import saved
from train.keep import hosts
from train.keep.checkpoint import Checkpointer
from train.keep.runs import RunDir, differences
from train.state import TrainState

ROOT = Path(__file__).resolve().parents[1]


@flax.struct.dataclass
class Adapter:
    """A node as LoRA is one after partition: its base is frozen."""

    base: Any
    a: jax.Array


class Data:
    """A source whose position is the step."""

    def __init__(self, fingerprint: str = "abc"):
        self.fingerprint, self.loaded = fingerprint, None

    def state_dict(self) -> dict:
        return {"fingerprint": self.fingerprint, "seed": 3}

    def load_state_dict(self, d: dict) -> None:
        assert d["fingerprint"] == self.fingerprint
        self.loaded = d


def config(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**dict(every=1, minutes=0, keep=2, keep_every=0, on_error="stop") | changed)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(step: int, shape: tuple[int, int] = (2, 4), rows: int = 16) -> TrainState:
    """Random arrays that depend on the step; matrices are sharded over both axes."""
    k = jax.random.split(jax.random.key(step), 3)
    table = jax.random.normal(k[0], (rows, 8)).astype(jnp.bfloat16)
    params = {"policy": {"table": table, "wq": Adapter(None, jax.random.normal(k[1], (8, 4))), "off": None}}
    frozen = {"policy": {"table": None, "wq": Adapter(jnp.ones((8, 8), jnp.int8), None), "off": jnp.arange(3)}}
    state = TrainState.create(params, frozen, optax.adam(1e-3), 7).replace(step=jnp.int32(step))
    mesh = mesh_of(*shape)
    spec = lambda x: P("fsdp", "tensor") if x.ndim == 2 else P()
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), state)


def same(a: Any, b: Any) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    bits = lambda x: (x.dtype, x.shape, np.asarray(x).tobytes())
    return all(bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def save(folder: Path, *steps: int, **changed: Any) -> None:
    ckpt = Checkpointer(folder, config(**changed))
    for step in steps:
        assert ckpt.maybe_save(step, make_state(step), Data())
    ckpt.close()


def restore(folder: Path, like: TrainState | None = None, **kwargs: Any) -> tuple[TrainState, list[str]]:
    told: list[str] = []
    ckpt = Checkpointer(folder, config(), log=told.append, **kwargs)
    return ckpt.restore(make_state(0) if like is None else like, Data()), told


def run_child(function: str, *args: Any, **kwargs: Any) -> subprocess.Popen:
    """A function of this file in a process of its own."""
    code = f"from tests import test_checkpoint as t; t.{function}(*{[str(a) for a in args]!r})"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return subprocess.Popen([sys.executable, "-c", code], **pipes | kwargs)


# --- digests and names -----------------------------------------------------------------------------------------------


def test_digest_by_hand():
    """Position 0 is scrambled to 0, so its odd factor is 1 in the first sum; position 1 to 0x514E28B7."""
    assert saved.digest(jnp.array([5], jnp.uint32))[0] == 5
    assert int(saved.digest(jnp.array([5, 2], jnp.uint32))[0]) == (5 + 2 * 0x514E28B7) % 2**32


def test_digest_is_the_same_on_every_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    want = saved.digest(x).tolist()
    for shape in [(1, 1), (2, 4), (8, 1)]:
        for spec in [P(), P("fsdp"), P("tensor", "fsdp"), P(None, ("fsdp", "tensor"))]:
            assert saved.digest(jax.device_put(x, NamedSharding(mesh_of(*shape), spec))).tolist() == want
    assert saved.digest(np.asarray(x)).tolist() == want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32", "float8_e4m3fn"])
def test_digest_shows_every_bit(dtype):
    x = np.asarray(jax.random.normal(jax.random.key(1), (5, 7)) * 9).astype(jnp.dtype(dtype))
    want, size = saved.digest(x).tolist(), x.dtype.itemsize
    for bit in range(0, x.size * size * 8, 8 if dtype == "bool" else 5):
        flipped = bytearray(x.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        assert saved.digest(np.frombuffer(flipped, x.dtype).reshape(x.shape)).tolist() != want


def test_digest_shows_a_swap_and_a_move():
    x = jnp.arange(1.0, 9.0)
    assert len({str(saved.digest(y)) for y in (x, x[::-1], jnp.roll(x, 1), x.at[0].set(2.0).at[1].set(1.0))}) == 4


def test_int4_has_a_digest():
    assert saved.digest(jnp.array([1, 2], jnp.int4)).tolist() != saved.digest(jnp.array([2, 1], jnp.int4)).tolist()


@pytest.mark.parametrize("tree", [{"a/b": 1, "a": {"b": 2}}, {"../evil": 1}, {"a": {"..": 1}}, {"": 1}, {1: 1, "1": 2}])
def test_hostile_names_are_refused(tree):
    with pytest.raises((ValueError, TypeError)):
        saved.named(tree)


def test_dotted_names_do_not_collide(tmp_path):
    class Tree(dict):
        frozen = {}
        replace = lambda self, frozen: self

    tree = Tree({"a.b": jnp.float32(1), "a": {"b": jnp.float32(2)}})
    jax.tree_util.register_pytree_with_keys(
        Tree, lambda t: (tuple((jax.tree_util.DictKey(k), t[k]) for k in sorted(t)), tuple(sorted(t))),
        lambda keys, leaves: Tree(zip(keys, leaves)),
    )  # fmt: skip
    ckpt = Checkpointer(tmp_path, config())
    ckpt.maybe_save(1, tree, Data())
    ckpt.close()
    zero = jax.tree.map(jnp.zeros_like, tree)
    assert ckpt.restore(zero, Data()) == tree


# --- save and restore ------------------------------------------------------------------------------------------------


def test_restores_every_bit_type_and_sharding(tmp_path):
    save(tmp_path, 3, 5)
    data, like = Data(), make_state(0)
    state = Checkpointer(tmp_path, config()).restore(like, data)
    assert same(state, make_state(5))
    assert data.loaded == {"fingerprint": "abc", "seed": 3}
    assert [x.sharding for x in jax.tree.leaves(state)] == [x.sharding for x in jax.tree.leaves(like)]


def test_nothing_to_restore(tmp_path):
    like = make_state(0)
    state, told = restore(tmp_path / "new", like)
    assert state is like and not told


def test_abstract_state(tmp_path):
    save(tmp_path, 3)
    like = make_state(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    assert same(restore(tmp_path, abstract.replace(frozen=like.frozen))[0], make_state(3))


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 2), (4, 2)])
def test_restores_on_another_mesh(tmp_path, shape):
    save(tmp_path, 3)
    state, told = restore(tmp_path, make_state(0, shape))
    assert same(state, make_state(3)) and not told
    assert state.params["policy"]["table"].sharding.mesh.devices.shape == shape


def test_next_step_may_donate_what_is_being_saved(tmp_path):
    state = make_state(1, rows=2**16)
    want = jax.tree.map(np.array, state)
    ckpt = Checkpointer(tmp_path, config())
    clobber = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 1, s), donate_argnums=0)
    ckpt.maybe_save(1, state, Data())
    for _ in range(3):
        state = clobber(state)
    ckpt.close()
    like = make_state(0, rows=2**16)
    assert same(Checkpointer(tmp_path, config()).restore(like, Data()), want)


def test_frozen_is_not_saved_but_checked(tmp_path):
    save(tmp_path, 3)
    assert not [name for name in saved.read_manifest(tmp_path / "3")["leaves"] if "frozen" in name or "off" in name]
    like = make_state(0)
    like.frozen["policy"]["off"] = like.frozen["policy"]["off"].at[0].set(9)
    with pytest.raises(UserError, match="frozen weights"):
        restore(tmp_path, like)
    state, _ = restore(tmp_path, like, allow=("config",))
    assert state.frozen["policy"]["off"][0] == 9 and state.step == 3
    assert (tmp_path / "3").exists()


def test_keeps_the_newest_and_every_nth(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    assert saved.steps(tmp_path) == [7, 6, 3]


def test_saves_by_steps_minutes_and_force(tmp_path):
    ckpt = Checkpointer(tmp_path, config(every=4, minutes=1.0, keep=9))
    assert [n for n in range(1, 9) if ckpt.maybe_save(n, make_state(n), Data())] == [4, 8]
    assert not ckpt.maybe_save(8, make_state(8), Data(), force=True)
    assert ckpt.maybe_save(9, make_state(9), Data(), force=True)
    ckpt._when -= 61
    assert ckpt.maybe_save(10, make_state(10), Data())
    assert not ckpt.maybe_save(11, make_state(11), Data())
    ckpt.close()
    assert saved.steps(tmp_path) == [10, 9, 8, 4]


# --- damage ----------------------------------------------------------------------------------------------------------


def largest(folder: Path) -> Path:
    return max(folder.glob("state/**/d/*"), key=lambda p: (p.stat().st_size, "process" in p.as_posix()))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_flipped_bit_falls_back_and_the_step_can_be_saved_again(tmp_path):
    big = lambda step: make_state(step, rows=2**12)
    told: list[str] = []
    ckpt = Checkpointer(tmp_path, config(), log=told.append)
    assert ckpt.maybe_save(3, big(3), Data()) and ckpt.maybe_save(5, big(5), Data())
    ckpt.close()
    path = largest(tmp_path / "5")
    flip(path, path.stat().st_size // 2)
    ckpt = Checkpointer(tmp_path, config(), log=told.append)
    assert same(ckpt.restore(big(0), Data()), big(3))
    assert len(told) == 1 and "step 5 is skipped" in told[0] and str(tmp_path / "5") in told[0] and "\n" not in told[0]
    assert (tmp_path / "invalid-5-0").is_dir() and saved.steps(tmp_path) == [3]
    assert ckpt.maybe_save(5, big(5), Data())
    ckpt.close()
    assert same(restore(tmp_path, big(0))[0], big(5))


def test_a_step_whose_arrays_are_all_damaged_is_one_line(tmp_path, capfd, caplog):
    tree, told = SimpleTree(params={f"w{i}": jnp.full(64, i) for i in range(50)}, frozen={}), []
    ckpt = Checkpointer(tmp_path, config(), log=told.append)
    assert ckpt.maybe_save(5, tree, Data())
    ckpt.wait()
    for path in (path for path in (tmp_path / "5").rglob("d/*") if path.is_file()):
        for at in range(0, path.stat().st_size, 40):
            flip(path, at)
    assert ckpt.restore(tree, Data()) is tree
    ckpt.close()
    time.sleep(0.3)  # the other arrays' reads end
    assert "step 5 is skipped" in told[0] and "\n" not in "".join(told)
    assert "Traceback" not in capfd.readouterr().err and not caplog.records


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_wrong_values_are_never_loaded(tmp_path):
    """Flips a bit here and there in every file: the step is told to be damaged, or loads as it was."""
    save(tmp_path, 5)
    want, step, found = make_state(5), tmp_path / "5", 0
    for path in [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]:
        for at in range(7, path.stat().st_size, max(path.stat().st_size // 6, 40)):
            flip(path, at)
            state, told = restore(tmp_path)
            assert state.step == 0 if told else same(state, want)
            found += bool(told)
            if told:
                shutil.move(tmp_path / "invalid-5-0", step)
            flip(path, at)
    assert found > 10 and same(restore(tmp_path)[0], want)


def test_message_names_the_leaf_and_the_file(tmp_path):
    save(tmp_path, 3)
    arrays = saved.named(make_state(3).replace(frozen=None))
    arrays["params/policy/wq/a"] = arrays["params/policy/wq/a"].at[0, 0].add(1)
    with pytest.raises(saved.Damaged, match=r"params/policy/wq/a in .*/3/state"):
        saved.verify(tmp_path / "3", arrays, saved.read_manifest(tmp_path / "3"))


def edit_manifest(step: Path) -> None:
    path = step / saved.MANIFEST
    path.write_text(path.read_text().replace('"step": 5', '"step": 6'))


def reseal(step: Path, **changed: Any) -> None:
    """A manifest with a right checksum and wrong entries; None: left out."""
    manifest = saved.read_manifest(step) | changed
    text = saved.seal({name: value for name, value in manifest.items() if value is not None})
    (step / saved.MANIFEST).write_text(text)


DAMAGE = {
    "manifest without files": lambda step: reseal(step, files=None),
    "manifest with a list of leaves": lambda step: reseal(step, leaves=[1]),
    "manifest with a strange leaf": lambda step: reseal(step, leaves={"params/x": {"shape": [1e9], "dtype": "int8"}}),
    "manifest nested deep": lambda step: (step / saved.MANIFEST).write_text("[" * 100_000),
    "data file truncated": lambda step: os.truncate(largest(step), 10),
    "data file missing": lambda step: largest(step).unlink(),
    "metadata missing": lambda step: (step / "state" / "_METADATA").unlink(),
    "root metadata missing": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "manifest missing": lambda step: (step / saved.MANIFEST).unlink(),
    "manifest cut": lambda step: os.truncate(step / saved.MANIFEST, 100),
    "manifest edited": edit_manifest,
    "all files missing": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_step_is_skipped_in_one_line(tmp_path, damage):
    save(tmp_path, 3, 5)
    DAMAGE[damage](tmp_path / "5")
    state, told = restore(tmp_path)
    assert same(state, make_state(3)) and len(told) == 1 and "\n" not in told[0] and str(tmp_path / "5") in told[0]


def test_strange_folders_are_ignored(tmp_path):
    save(tmp_path, 3)
    for name in ("9", "notes", "4.orbax-checkpoint-tmp-17", "8.tmp"):
        (tmp_path / name).mkdir()
    state, told = restore(tmp_path)
    assert same(state, make_state(3))
    assert len(told) == 2 and "notes" in told[0] and "step 9 is skipped" in told[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "invalid-9-0", "notes"]


def test_step_without_orbax_markers_is_accepted(tmp_path):
    """Copies by object stores lose them; our digests say more."""
    save(tmp_path, 3)
    (tmp_path / "3" / "commit_success.txt").unlink()
    state, told = restore(tmp_path)
    assert same(state, make_state(3)) and not told


def test_no_whole_step_left(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "3" / saved.MANIFEST).unlink()
    state, told = restore(tmp_path)
    assert state.step == 0 and "starting at step 0" in told[-1]


def test_other_shape_is_refused_not_moved(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"opt_state/0/mu/policy/table is bfloat16\[16, 8\] in step 3, but bfloat16\[32, 8\]"
    ):
        restore(tmp_path, make_state(0, rows=32))
    assert saved.steps(tmp_path) == [3]


def test_other_data_are_refused(tmp_path):
    save(tmp_path, 3)
    with pytest.raises(UserError, match="data differ from those of step 3"):
        Checkpointer(tmp_path, config()).restore(make_state(0), Data("xyz"))
    assert Checkpointer(tmp_path, config(), allow=("data",)).restore(make_state(0), Data("xyz")).step == 3


def test_load_params(tmp_path):
    run = RunDir(tmp_path, {"steps": 3})
    run.close()
    save(tmp_path / "ckpt", 3, 5)
    got = saved.load_params(tmp_path)
    assert got.step == 5 and got.config == {"steps": 3} and sorted(got.params) == ["policy/table", "policy/wq/a"]
    assert got.params["policy/table"].tobytes() == np.asarray(make_state(5).params["policy"]["table"]).tobytes()
    assert got.frozen == saved.fingerprints(make_state(0).frozen)
    assert saved.load_params(tmp_path, step=3).step == 3
    os.truncate(largest(tmp_path / "ckpt" / "5"), 10)
    assert saved.load_params(tmp_path).step == 3 and saved.steps(tmp_path / "ckpt") == [5, 3]
    with pytest.raises(UserError, match="10 bytes"):
        saved.load_params(tmp_path, step=5)
    with pytest.raises(UserError, match="no checkpoint"):
        saved.load_params(tmp_path / "nowhere")


# --- kills and full disks, in processes of their own -----------------------------------------------------------------


def child_killed(folder: str) -> None:
    ckpt = Checkpointer(folder, config())
    ckpt.maybe_save(3, make_state(3, rows=2**18), Data())
    ckpt.wait()
    ckpt.maybe_save(5, make_state(5, rows=2**18), Data())
    while not list(Path(folder).glob("5.tmp*/**/d/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_during_a_save(tmp_path):
    assert run_child("child_killed", tmp_path).wait() == -signal.SIGKILL
    assert sorted(p.name[:5] for p in tmp_path.iterdir()) == ["3", "5.tmp"]
    like = make_state(0, rows=2**18)
    state, told = restore(tmp_path, like)
    assert same(state, make_state(3, rows=2**18)) and not told
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_a_process_that_ends_with_an_error_waits_for_no_other(tmp_path, monkeypatch):
    """The others may be in another collective, or wait for this process in Orbax: asking them would never end."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def asked(ok: bool) -> bool:
        raise AssertionError("a collective")

    ckpt = Checkpointer(tmp_path, config())
    ckpt.maybe_save(1, make_state(1), Data())
    monkeypatch.setattr(hosts, "all_true", asked)
    with pytest.raises(ValueError, match="elsewhere"), ckpt:
        raise ValueError("elsewhere")
    assert saved.steps(tmp_path) == [1]
    monkeypatch.undo()
    ckpt = Checkpointer(tmp_path, config())
    monkeypatch.setattr(saved, "finish", full)
    ckpt.maybe_save(2, make_state(2), Data())
    monkeypatch.setattr(hosts, "all_true", asked)
    with pytest.raises(UserError, match=r"step 2 could not be written: .*No space left"):
        ckpt.wait()


def child_full_disk(folder: str) -> None:
    """Files may not grow beyond 20 kB for a while."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited, told = resource.getrlimit(resource.RLIMIT_FSIZE), []
    ckpt = Checkpointer(folder, config(on_error="continue"), log=told.append)
    ckpt.maybe_save(3, make_state(3, rows=2**16), Data())
    ckpt.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    assert ckpt.maybe_save(5, make_state(5, rows=2**16), Data())
    assert ckpt.maybe_save(5, make_state(5, rows=2**16), Data(), force=True)  # the failed step can be tried again
    assert len(told) == 1 and "step 5 could not be written" in told[0] and "\n" not in told[0], told
    assert saved.steps(Path(folder)) == [3]
    ckpt.wait()
    assert len(told) == 2
    ckpt.cfg.on_error = "stop"
    ckpt.maybe_save(6, make_state(6, rows=2**16), Data())
    try:
        ckpt.wait()
        raise AssertionError("no error")
    except UserError as e:
        print(e)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert sorted(p.name for p in Path(folder).iterdir()) == ["3"], list(Path(folder).iterdir())
    assert ckpt.maybe_save(7, make_state(7, rows=2**16), Data())
    ckpt.close()


def test_full_disk(tmp_path):
    child = run_child("child_full_disk", tmp_path)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    assert "step 6 could not be written" in out and out.count("\n") == 1
    state, told = restore(tmp_path, make_state(0, rows=2**16))
    assert same(state, make_state(7, rows=2**16)) and not told


# --- the run folder --------------------------------------------------------------------------------------------------


def test_differences_by_hand():
    old, new = {"optim": {"lr": 0.1, "name": "adamw"}, "steps": 1}, {"optim": {"lr": 0.2, "name": "adamw"}, "seed": 0}
    assert list(differences(old, new)) == [
        ("optim.lr", "0.1 -> 0.2"),
        ("seed", "null -> 0"),
        ("steps", "1 -> null"),
    ]


def test_the_newest_checkpoint_knows_the_config_and_the_step(tmp_path):
    RunDir(tmp_path, BASE).close()
    ckpt = Checkpointer(tmp_path / "ckpt", config(), config=BASE)
    ckpt.maybe_save(3, make_state(3), Data())
    ckpt.close()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"optim.lr: 0.1 -> 0.2"):
        RunDir(tmp_path, BASE | {"optim": {"lr": 0.2}})
    with pytest.raises(UserError, match=r"3 steps are done, but config\.steps is 2"):
        RunDir(tmp_path, BASE | {"steps": 2})
    RunDir(tmp_path, BASE | {"steps": 3}).close()


def test_what_must_be_durable_before_a_save_and_is_not_fails_the_save(tmp_path):
    def first() -> None:
        raise OSError(28, "no room")

    told: list[str] = []
    ckpt = Checkpointer(tmp_path, config(on_error="continue"), log=told.append, first=first)
    ckpt.maybe_save(3, make_state(3), Data())
    ckpt.wait()
    assert len(told) == 1 and "no room" in told[0] and not saved.steps(tmp_path)
    ckpt.maybe_save(4, make_state(4), Data())
    with pytest.raises(UserError, match="no room"):  # the last step of a run
        ckpt.wait(must=True)


BASE = {"steps": 10, "allow": (), "optim": {"lr": 0.1}, "data": {"source": "a", "cache": "x"}, "mesh": {"data": 1}}


@pytest.mark.parametrize(
    "change, refused",
    [
        ({"steps": 20, "mesh": {"data": 2}}, ""),
        ({"data": {"source": "a", "cache": "y"}}, ""),
        ({"optim": {"lr": 0.2}}, "optim.lr: 0.1 -> 0.2"),
        ({"optim": {"lr": 0.2}, "allow": ("config",)}, ""),
        ({"optim": {"lr": 0.2}, "allow": ("data",)}, "optim.lr"),
        ({"data": {"source": "b", "cache": "x"}}, "put 'data' in config.allow"),
        ({"data": {"source": "b", "cache": "x"}, "allow": ("data",)}, ""),
    ],
)
def test_resume_with_a_changed_config(tmp_path, capsys, change, refused):
    with RunDir(tmp_path, BASE) as run:
        assert not run.resumed
    (tmp_path / "ckpt" / "3").mkdir(parents=True)
    if refused:
        with pytest.raises(UserError, match=refused):
            RunDir(tmp_path, BASE | change)
        with RunDir(tmp_path, BASE) as run:
            assert run.resumed and not run.changes
    else:
        with RunDir(tmp_path, BASE | change) as run:
            assert run.changes
        assert f"  {run.changes[-1]}" in capsys.readouterr().out


def test_config_is_free_until_the_first_checkpoint(tmp_path):
    RunDir(tmp_path, BASE).close()
    RunDir(tmp_path, BASE | {"optim": {"lr": 0.2}}).close()


def test_run_folder_tells_how_to_do_it_again(tmp_path):
    RunDir(tmp_path, BASE, overrides={"steps": 10}, source=__file__).close()
    names = {"config.json", "overrides.json", "environment.json", "config_source.py", "LOCK"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert '"jax"' in (tmp_path / "environment.json").read_text()
    assert (tmp_path / "config_source.py").read_text() == Path(__file__).read_text()


@pytest.mark.parametrize("name", ["LOCK", "config_source.py", "metrics.jsonl", "ckpt", "environment.json"])
def test_links_in_a_run_folder_are_not_followed(tmp_path, name):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.write_text("kept")
    (run / name).symlink_to(outside)
    if name in ("config_source.py", "environment.json"):
        RunDir(run, BASE, source=__file__).close()
        assert not (run / name).is_symlink()
    else:
        with pytest.raises(UserError, match=f"{name} · a run folder must not contain symbolic links"):
            RunDir(run, BASE, source=__file__)
    assert outside.read_text() == "kept"


def test_workdir_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir"):
        RunDir(tmp_path / "file", BASE)


def test_second_launch_is_refused(tmp_path):
    with RunDir(tmp_path, BASE), pytest.raises(UserError, match=rf"in use by pid {os.getpid()} on .* since 20"):
        RunDir(tmp_path, BASE)
    RunDir(tmp_path, BASE).close()


def child_runs(folder: str, seconds: str = "60") -> None:
    with RunDir(folder, BASE) as run:
        print("ready", flush=True)
        for step in range(int(float(seconds) * 100)):
            time.sleep(0.01)
            if run.stop_requested(step):
                print("stopping", flush=True)
                time.sleep(5 if os.path.exists(f"{folder}/slow") else 0)
                sys.exit(75)


def test_signals_and_the_lock_of_a_killed_run(tmp_path):
    (tmp_path / "slow").touch()
    jobs = [run_child("child_runs", tmp_path / str(i)) for i in range(4)]
    for i, job in enumerate(jobs):
        assert job.stdout.readline() == "ready\n"
        if i in (1, 2):
            (tmp_path / str(i) / "slow").touch()
    with pytest.raises(UserError, match=f"pid {jobs[3].pid} "):
        RunDir(tmp_path / "3", BASE)
    for job, first in zip(jobs, (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGKILL)):
        job.send_signal(first)
    for job, second in ((jobs[1], signal.SIGTERM), (jobs[2], signal.SIGINT)):
        assert job.stdout.readline() == "stopping\n"
        job.send_signal(second)
    assert [job.wait(20) for job in jobs] == [75, 143, 130, -signal.SIGKILL]
    for i in range(4):
        RunDir(tmp_path / str(i), BASE).close()


# --- two processes ---------------------------------------------------------------------------------------------------


def child_pair(port: str, index: str, folder: str) -> None:
    """Starts with two configs (refused), then trains until one process gets SIGTERM, and restores what was saved."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    refused = ""
    try:
        RunDir(folder, BASE | {"seed": int(index)})
    except UserError as e:
        refused = str(e)
    assert "the processes differ in config" in refused, refused
    with RunDir(folder, BASE) as run:
        mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
        x = jnp.arange(64.0).reshape(8, 8)
        make = lambda n: {"w": x + n, "b": jnp.full((4,), n, jnp.bfloat16)}
        place = {"w": NamedSharding(mesh, P("fsdp", "tensor")), "b": NamedSharding(mesh, P())}
        create = jax.jit(lambda n: make(n), out_shardings=place)
        tree = lambda n: SimpleTree(params=create(n), frozen={})
        ckpt = Checkpointer(f"{folder}/ckpt", config(every=0, minutes=0))
        for step in range(1, 3000):
            if step == 3:
                print("ready", flush=True)
            time.sleep(0.01)
            if run.stop_requested(step):
                break
        assert ckpt.maybe_save(step, tree(step), Data(), force=True)
        ckpt.wait()
        assert ckpt.maybe_save(step + 1, tree(step + 1), Data(), force=True)
        ckpt.wait()
        if jax.process_index() == 0:
            flip(largest(Path(folder) / "ckpt" / str(step + 1)), 100)
        told: list[str] = []
        got = Checkpointer(f"{folder}/ckpt", config(), log=told.append).restore(tree(0), Data())
        assert len(told) == 1, told
        for shard in got.params["w"].addressable_shards:
            assert (np.asarray(shard.data) == np.asarray(make(step)["w"])[shard.index]).all()
        clock = Checkpointer(f"{folder}/clock", config(every=0, minutes=1.0))
        clock._when -= 61 * (1 - jax.process_index())  # the first process's clock decides
        assert [n for n in (11, 20, 21, 30) if clock.maybe_save(n, tree(n), Data())] == [20]
        clock.close()
        print("stopped", step, flush=True)


@flax.struct.dataclass
class SimpleTree:
    params: Any
    frozen: Any


def test_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    pair = [run_child("child_pair", port, i, tmp_path, env=env) for i in range(2)]
    try:
        assert "ready\n" in iter(pair[1].stdout.readline, ""), pair[1].stderr.read()  # gloo speaks first
        pair[1].send_signal(signal.SIGTERM)
        results = [job.communicate(timeout=60) for job in pair]
    finally:
        for job in pair:
            job.kill()
    assert [job.returncode for job in pair] == [0, 0], results[0][1] + results[1][1]
    steps = {out.strip().splitlines()[-1] for out, _ in results}
    assert len(steps) == 1 and steps.pop().startswith("stopped")
    step = saved.steps(tmp_path / "ckpt")[0]
    one = SimpleTree({"w": jnp.zeros((8, 8)), "b": jnp.zeros(4, jnp.bfloat16)}, {})
    got, told = restore(tmp_path / "ckpt", one)  # and by one process alone
    assert not told and (got.params["w"] == jnp.arange(64.0).reshape(8, 8) + step).all()
