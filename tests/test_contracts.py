"""Contracts that walk the folders: a new file is tested by existing."""

import ast
import importlib
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from configs import schema
from configs.models import SHAPES
from configs.schema import methods
from data.rows import batch as batches
from model import build, heads, weights
from model.config import ModelConfig
from tests.helpers.packages import OBJECTIVES, PACKAGES, SOURCES
from tests.helpers.steps import config

ROOT = Path(__file__).resolve().parents[1]

# What each package may import, besides itself. `model` and `data` stand beside each other.
ALLOWED = {
    "common": set(),
    "configs": {"common"},
    "data": {"common", "configs"},
    "feedback": {"common", "data"},
    "kernels": set(),
    "model": {"common", "configs", "kernels"},
    "infer": {"common", "configs", "data", "model"},
    "evals": {"common", "configs", "data", "model", "infer"},
    "train": {"common", "configs", "data", "model", "infer", "evals"},
    "tools": set(PACKAGES) - {"examples"},
    "examples": set(PACKAGES),
}
HEAVY = {"torch", "transformers", "peft", "trl"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        used = imports(path)
        assert not (used & set(PACKAGES)) - ALLOWED[package] - {package}, path
        if path.name != "peers.py":
            assert not used & HEAVY, path
        if package == "data":
            assert not used & {"jax", "flax"}, path


def test_no_module_imports_itself_in_a_circle():
    """At import time, that is; what a function imports when it is called may look back."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    used = {}
    for name, path in modules.items():
        nodes = [n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.ImportFrom) and n.module]
        pairs = [(f"{n.module}.{alias.name}", n.module) for n in nodes for alias in n.names]
        used[name] = {whole if whole in modules else part for whole, part in pairs} & modules.keys()
    while leaves := {name for name, others in used.items() if not others}:  # what is left when no leaf is, is a circle
        used = {name: others - leaves for name, others in used.items() if name not in leaves}
    assert not used


def test_tests_share_helpers_and_do_not_import_each_other():
    found = {
        (path.name, node.module)
        for path in (ROOT / "tests").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.test_")
    }
    assert not found


def test_functions_are_at_most_60_lines():
    """But for the table of all keys."""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and (path.name, node.name) != ("base.py", "get_config"):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


# Who writes without common/files.py, and why nothing is half written by it.
WRITERS = {
    "data/cache.py": "into a folder of files.folder",
    "data/text/tokenizer.py": "into a folder of files.folder",
    "model/io/export.py": "into a folder of files.folder",
    "model/io/peft_write.py": "into a folder of files.folder",
    "train/keep/checkpoint.py": "renames folders that the manifest makes whole",
    "train/keep/runs.py": "a lock, which is held and not read",
    "feedback/store.py": "an empty file, which SQLite fills in transactions",
    "infer/retrieve/index.py": "arrays, into a folder of common.files and into memory",
    "evals/features.py": "arrays, into memory",
}
WRITES = {
    "write_text", "write_bytes", "tofile", "save_file", "savez", "copy", "copy2", "copyfile", "copytree", "move",
    "rename", "symlink_to", "link_to", "hardlink_to", "touch",
}  # fmt: skip
MODULES = {"copy", "move", "save", "savez", "replace", "dump"}  # these only of the modules below
OF = {"shutil", "os", "np", "numpy", "json", "pickle", "jnp"}


def writes(call: ast.Call) -> bool:
    """Whether a call opens a file to write it, or writes, copies or renames one."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    holder = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if name == "open":
        safe = any(k.arg == "opener" and ast.unparse(k.value) == "files.not_followed" for k in call.keywords)
        texts = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        flags = {"O_WRONLY", "O_RDWR", "O_CREAT"} & {n.attr for n in ast.walk(call) if isinstance(n, ast.Attribute)}
        modes = [t for t in texts if isinstance(t, str) and len(t) <= 3 and set(t) & set("wax+")]
        return bool((modes and not safe) or (flags and "devnull" not in ast.unparse(call)))
    return name in MODULES and holder in OF if name in MODULES else name in WRITES


def test_files_are_written_by_the_one_helper():
    found = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and writes(node):
                found.setdefault(str(path.relative_to(ROOT)), []).append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    found.pop("common/files.py")
    assert found.keys() == WRITERS.keys(), {k: v for k, v in found.items() if k not in WRITERS}
    for text in ("open(p, 'w')", "p.open('ab')", "os.replace(a, b)", "shutil.copy(a, b)", "p.write_text(t)"):
        assert writes(ast.parse(text).body[0].value), text
    for text in ("open(p)", "open(p, 'rb')", "t.replace('a', 'b')", "open(p, 'ab', opener=files.not_followed)"):
        assert not writes(ast.parse(text).body[0].value), text


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective(name):
    """Every loss is a finite (sum, weight) pair, moves with its parameters, and ignores what its mask leaves out."""
    c = config(**{"objective.name": name})
    model = build.model(c, None, 500)
    objective = build.find("train.objectives", c.objective)(model)
    params = {name: (r.model or model).init(jax.random.key(0)) for name, r in objective.roles.items()}
    for role in (name for name, r in objective.roles.items() if r.head):
        params[role]["head"] = heads.find(objective.roles[role].head)(model.config, jax.random.key(1))
    batch = batches.example(objective.batch, 2, 32, 500)
    loss = jax.jit(lambda p, b: objective.loss({**params, "policy": p}, b, jax.random.key(0)))
    metrics = loss(params["policy"], batch)
    assert all(np.shape(x) == () and np.isfinite(x) for pair in metrics.values() for x in pair)
    grads = jax.grad(lambda p: loss(p, batch)["loss"][0])(params["policy"])
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    hidden = jax.tree.map(np.array, batch)
    for part in batches.parts(hidden).values():
        part["targets"][part["mask"] == 0] = 3
    np.testing.assert_allclose(loss(params["policy"], hidden)["loss"], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", methods.names("model/heads", "make"))
def test_head(name):
    """A leaf beside the layers: it knows its axes and its cost, trains, goes when adapters are off, stays when merged;
    float32 for every token, small at first, whatever the type of the hidden states."""
    model = build.network(ModelConfig.from_dict(SHAPES["tiny"]))
    head = heads.find(name)(model.config, jax.random.key(0))
    params = {**model.abstract, "head": head}
    names = weights.axes(params, model.specs)["head"]
    jax.tree.map(lambda x, axes: len(axes) == x.ndim or pytest.fail(f"{axes} of {x.shape}"), head, names)
    assert sum(jax.tree.leaves(head.macs(0))) > 0
    assert weights.dense(params, model.specs)["head"] is head and "head" not in weights.base(params)
    mask = weights.trainable(params, "adapters")
    assert all(jax.tree.leaves(mask["head"])) and not any(jax.tree.leaves(mask["layers"]))
    x = jax.random.normal(jax.random.key(1), (2, 5, model.config.embed), jnp.bfloat16)
    y = head(x)
    assert y.shape[:2] == (2, 5) and y.dtype == jnp.float32 and float(jnp.abs(y).max()) < 0.1
    grads = jax.grad(lambda h: h(x).sum())(head)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_a_head_that_is_no_file_is_one_line():
    with pytest.raises(UserError, match=r"config · model\.heads has no 'os' · known: scalar"):
        heads.find("os")


CONFIGS = sorted(p for p in (ROOT / "configs").glob("*/*.py") if p.name != "__init__.py" and p.parent.name != "schema")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def quick(path: Path) -> bool:
    """Configs that at the tiny size are another one's twin, a bigger model's or a sweep's, are left to `make slow`."""
    return path.stem.endswith("tiny")


@pytest.mark.parametrize(
    "path", [p if quick(p) else pytest.param(p, marks=pytest.mark.slow) for p in CONFIGS], ids=name_of
)
def test_config_runs_three_steps_at_tiny_size(path, tmp_path):
    """With its objective, method, optimizer and format; the shape, the batch and the source are made small."""
    from train.main import run

    argv = [
        f"--config={path}", f"--workdir={tmp_path}", "--config.model.shape=tiny", "--config.init=", "--config.steps=3",
        "--config.data.tokenizer=bytes", "--config.data.seq_len=64", "--config.data.batch_size=8", "--config.accum=1",
        "--config.evals=()", "--config.samples=()", "--config.eval_batches=1", "--config.log_every=1",
        f"--config.data.cache={tmp_path}/cache", "--config.model.vocab_size=512", "--config.epochs=0",
    ]  # fmt: skip
    loaded = schema.load(argv)
    source = SOURCES[methods.method("objective", loaded.config.objective.name).batch]
    argv += [f"--config.data.source={source}", "--config.data.eval_source=", "--config.data.fields="]
    loaded = schema.load(argv)
    assert run(loaded) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines if line["kind"] == "train")


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_config_tells_its_story(path):
    """What it shows, the command that runs it, the hardware, the expected result."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    assert f"--config={path.relative_to(ROOT)}" in text
    assert "Hardware" in text and "xpected" in text
    assert len(path.read_text("utf-8").splitlines()) <= 60


def test_the_base_has_at_most_80_keys():
    assert len(schema.flatten(schema.to_dict(importlib.import_module("configs.base").get_config()))) <= 80
