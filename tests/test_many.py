"""Many adapters in one batch against each alone: products, a bounded device, decoding."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from data.text.formats import load as load_tokenizer
from infer import batch, prefix
from infer.generate import generate
from infer.lm import LM
from infer.models import load, load_many
from infer.serve import store as stores
from infer.serve.batcher import Batcher
from kernels import paged_lora
from model import paged, weights
from model.io import peft_write
from model.io.export import export_hf
from model.peft import dora
from tests.helpers.adapters import NAMES, PROMPTS, adapted, make, store_of
from tests.helpers.models import rand
from tools.plan import hlo
from train.mesh import RULES, make_mesh, shardings


@pytest.fixture(scope="module", params=["plain", pytest.param("nf4", marks=pytest.mark.slow)])
def served(request):
    """A model, its base, and the trees of four adapters of different ranks on different weights."""
    return make(request.param)


def stacked(params):
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}


def alone(model, base, trees, names, prompts, n):
    out = [generate(model, trees.get(name, base), [p], max_new_tokens=n) for name, p in zip(names, prompts)]
    return [o.tokens[0] for o in out]


@pytest.mark.parametrize("saved", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16", "float16"])
def test_adapters_saved_in_16_bits_are_held_so(saved):
    """And multiply as the same numbers in 32 bits do."""
    model, base, trees = make()

    def rounded(tree):
        train, frozen = weights.partition(tree, weights.trainable(tree, "adapters"))
        return weights.combine(jax.tree.map(lambda x: x.astype(saved).astype(x.dtype), train), frozen)

    trees, names, prompts = {n: rounded(trees[n]) for n in "bcd"}, ["b", None, "c", "d"], PROMPTS[:4]
    store = store_of(model, base, trees)
    assert {x.dtype for pairs in store.stacks.values() for pair in pairs for x in pair} == {jnp.dtype(saved)}
    got = generate(model, None, prompts, adapters=names, store=store, max_new_tokens=4)
    assert got.tokens == alone(model, base, trees, names, prompts, 4)


@pytest.fixture
def interpreted(request, monkeypatch):
    """The kernels of a platform, on the CPU: a list of those that were called."""
    call, called = pl.pallas_call, []
    interpret = lambda kernel, *a, **k: called.append(kernel) or call(kernel, *a, **k | {"interpret": True})
    monkeypatch.setattr(pl, "pallas_call", interpret)
    monkeypatch.setattr(paged_lora, "supported", lambda *_: request.param == "tpu")
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, **on: on.get(request.param, default)(*a))
    return called


kernels = pytest.mark.parametrize("interpreted", ["tpu", "cuda"], indirect=True)


@kernels
def test_by_hand(interpreted):
    """Row 0 has pages 2 and 0, row 1 has none: x = 2, A = (1, 5, 3), B = (10, 7, 100): 2 * (3 * 100 + 1 * 10)."""
    rank_row = lambda *page: jnp.zeros((3, paged_lora.PAGE)).at[:, 4].set(jnp.array(page)).reshape(-1, 1)
    args = rank_row(1, 5, 3), rank_row(10, 7, 100), jax.tree.map(jnp.asarray, paged_lora.route([(2, 0), (0, 0)], 5))
    for product in (paged_lora.matmul, paged_lora.loop, paged_lora.reference):
        np.testing.assert_array_equal(product(jnp.full((2, 1, 1), 2.0), *args)[:, 0, 0], [620.0, 0.0])


@kernels
@pytest.mark.parametrize(
    "tokens, dtype, k, n", [(1, "float32", 24, 40), (1, "bfloat16", 530, 300), (5, "float32", 24, 40)]
)
def test_product_equals_its_reference(interpreted, tokens, dtype, k, n):
    """Two steps of the TPU's kernel, parts of K and of N of the GPU's, a page that two rows share, room without a page,
    rows without one."""
    own = {0: range(1, 6), 2: [3, 7, 11], 3: [3, *range(12, 18)], 5: [0]}
    route = jax.tree.map(jnp.asarray, paged_lora.route([(page, row) for row, at in own.items() for page in at], 21))
    assert len(set(route.pages.tolist()) - {-1}) == 14 and int(route.count) == 16
    x, a, b = rand(7, tokens, k, seed=5), rand(320, k, seed=1), rand(320, n, seed=2)
    a, b = (w.at[page * 16 : page * 16 + 16].set(jnp.nan) for w, page in ((a, 9), (b, 8)))  # that nobody uses
    cast = [w.astype(dtype) for w in (x, a, b)]
    ours = jax.jit(lambda *args: paged_lora.matmul(*args))(*cast, route).astype(jnp.float32)  # traced anew
    want = paged_lora.reference(*(jnp.nan_to_num(w.astype(jnp.float32)) for w in cast), route)
    np.testing.assert_allclose(ours, want, atol=(1e-5 if dtype == "float32" else 2e-2) * float(jnp.abs(want).max()))
    assert not ours[jnp.array([1, 4, 6])].any() and ours[5].any()
    assert bool(interpreted) == (tokens == 1)


@pytest.mark.parametrize("tokens", [1, 5])
def test_no_stack_of_bfloat16_becomes_float32(tokens):
    stack = jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16)
    x, route = jnp.zeros((4, tokens, 64)), paged_lora.route([(7, 0)], 4)
    memory = jax.jit(paged_lora.loop).lower(x, stack, stack, route).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 64 * 2


# --- under a mesh ---

ON = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "context": {"fsdp": 4, "context": 2},
}


def on(mesh):
    """The context of a mesh over fake devices."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.set_mesh(make_mesh({"data": 1} | ON[mesh])))
    stack.enter_context(nn.logical_axis_rules(RULES))
    return stack


def leaf_of(eqn, pages=20, k=24, n=40):
    """On a base of zeros. Rows 1 and 6 have no page, 3 and 4 share one, and one that nobody uses is not finite."""
    own = {0: range(1, 6), 2: [3, 7], 3: [9], 4: [9, 10], 5: [0], 7: range(12, 18)}
    route = jax.tree.map(jnp.asarray, paged_lora.route([(page, row) for row, at in own.items() for page in at], 21))
    a, b = (rand(pages * paged_lora.PAGE, size, seed=size).at[8 * 16 : 9 * 16].set(jnp.nan) for size in (k, n))
    return paged.PagedLoRA(jnp.zeros((k, n)), a, b, eqn, route)


@pytest.mark.parametrize(
    "mesh, interpreted, kernels",
    [
        *((mesh, "cpu", 0) for mesh in ON),
        ("all", "tpu", 0),
        ("data", "tpu", 1),
        ("data", "cuda", 2),
        ("all", "cuda", 2),
    ],
    indirect=["interpreted"],
)
@pytest.mark.parametrize("eqn", ["BTD,DF->BTF", "BTF,FD->BTD", pytest.param("BTD,VD->BTV", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_on_shards_it_is_the_reference(interpreted, mesh, kernels, eqn, tokens):
    leaf = leaf_of("BTV,VD->BTD" if "V" in eqn else eqn)
    a, b = (leaf.b, leaf.a) if "V" in eqn else (leaf.a, leaf.b)
    x = rand(8, tokens, a.shape[1], seed=5)
    want = paged_lora.reference(x, *map(jnp.nan_to_num, (a, b)), leaf.route)
    with on(mesh):
        got = jax.jit(lambda leaf, x: leaf.einsum(eqn, x))(leaf, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))
    assert not got[jnp.array([1, 6])].any() and len(interpreted) == kernels * (tokens == 1)


@pytest.mark.parametrize("mesh", [None, "all"])
def test_rows_of_a_table_are_products_with_ones(mesh):
    leaf, ids = leaf_of("BTV,VD->BTD"), jax.random.randint(jax.random.key(0), (8, 3), 0, 24)
    want = leaf.einsum(leaf.eqn, jax.nn.one_hot(ids, 24))
    with on(mesh) if mesh else contextlib.nullcontext():
        got = jax.jit(lambda leaf, ids: leaf.take(ids, jnp.float32))(leaf, ids)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_shards_do_nothing_for_pages_that_nobody_uses():
    """As many operations and as many bytes sent with 20 pages as with 40 of them; the reference multiplies them all."""
    eqn, x = "BTD,DF->BTF", rand(8, 1, 24)

    def cost(pages, f):
        with on("all"):
            mesh, leaf = jax.sharding.get_mesh(), leaf_of(eqn, pages)
            laid = {field: jax.device_put(getattr(leaf, field), NamedSharding(mesh, P(None, axis)))
                    for field, axis in (("a", "fsdp"), ("b", "tensor"))}  # fmt: skip
            program = jax.jit(f).lower(leaf.replace(**laid), x).compile()
        return program.cost_analysis()["flops"], hlo.Program(program.as_text(), 1).sent(dict(mesh.shape))

    product = lambda leaf, x: leaf.einsum(eqn, x)
    every = lambda leaf, x: paged_lora.reference(x, leaf.a, leaf.b, leaf.route)
    assert cost(20, product) == cost(40, product) and cost(20, product)[1]
    assert cost(20, every)[0] < cost(40, every)[0]


@pytest.mark.slow
def test_a_sharded_base_decodes_a_mixed_batch_as_one_device_does():
    """The base and the stacks lie over the mesh; both by `generate` and by requests that join a running batch."""
    model, base, trees = make()
    names, prompts = [*NAMES, "c", None], [*PROMPTS, [8, 1], [33]]
    want = generate(model, None, prompts, adapters=names, store=store_of(model, base, trees), max_new_tokens=6).tokens
    with on("all"):
        laid = jax.device_put(base, shardings(weights.axes(base, model.specs), base, jax.sharding.get_mesh()))
        store = store_of(model, laid, trees)
        assert generate(model, None, prompts, adapters=names, store=store, max_new_tokens=6).tokens == want
        a, b = store.stacks["layers/mlp/up"][1]
        assert [w.size // w.addressable_shards[0].data.size for w in (a, b)] == [2, 2]
        batcher = Batcher(LM(model, laid, load_tokenizer("bytes"), store), rows=8, length=32)
        requests = [batcher.submit(p, adapter=a, max_new_tokens=6) for p, a in zip(prompts, names)]
        while batcher.waiting or any(batcher.rows):
            batcher.step()
    for request, tokens in zip(requests, want):
        assert list(request) == tokens[: len(request.tokens)] and (len(request.tokens) == 6 or request.stopped)


def test_a_mixed_batch_has_the_logits_of_each_alone(served):
    model, base, trees = served
    store = store_of(model, base, trees)
    tokens = jax.random.randint(jax.random.key(3), (len(NAMES), 9), 0, 320)
    forward = jax.jit(model.__call__)
    unrolled = store.serving(NAMES, len(NAMES))
    for params in (unrolled, stacked(unrolled)):
        ours = forward(params, tokens)
        for i, name in enumerate(NAMES):
            want = forward(trees.get(name, base), tokens)[i]
            np.testing.assert_allclose(ours[i], want, atol=1e-5 * float(jnp.abs(want).max()))


def test_the_device_holds_the_pages_of_the_adapters():
    """17 rank rows take two pages of 16, anything less one."""
    model, base, trees = make()
    store = store_of(model, base, trees)
    pages = {path: -(-stack[0][0].shape[0] // paged_lora.PAGE) for path, stack in store.stacks.items()}
    wanted = {"embed/table": 2, "layers/attn/wq": 4, "layers/attn/wk": 2, "layers/attn/wo": 3, "layers/mlp/up": 2}
    assert wanted.items() <= pages.items()


@pytest.mark.slow
def test_decoding_a_mixed_batch_gives_the_tokens_of_each_alone():
    model, base, trees = make()
    store = store_of(model, base, trees)
    ours = generate(model, None, PROMPTS, adapters=NAMES, store=store, max_new_tokens=12)
    assert ours.tokens == alone(model, base, trees, NAMES, PROMPTS, 12)
    assert len({tuple(t) for t in ours.tokens}) > 3


@pytest.mark.slow
def test_the_least_recently_used_leave_and_nothing_compiles_again():
    model, base, trees = make()
    store = store_of(model, base, trees, rank_rows=48)  # b has 2 pages, others 1
    batches = [["a", None], ["b", "a"], ["c", "d"], ["c", "a"], ["b", "b"], ["a", "b"]]
    counts = []
    for names in batches:
        ours = generate(model, None, PROMPTS[:2], adapters=names, store=store, max_new_tokens=6)
        assert ours.tokens == alone(model, base, trees, names, PROMPTS, 6), names
        counts.append([f._cache_size() for f in (batch._decode, prefix._prefill, stores._put)])
    assert counts[-1] == counts[3] and "d" not in store.held  # each weight's stacks were written once by then
    with pytest.raises(UserError, match="total rank"):
        store.serving(["a", "b", "c"], 3)
    with pytest.raises(UserError, match="no adapter 'e'"):
        store.serving(["e"], 1)
    with pytest.raises(UserError, match="space for rank 31"):
        store_of(model, base, trees, rank_rows=31)


def test_other_adapters_than_lora_are_refused():
    model, base, _ = make()
    tree = dora.make(rank=2)(base, model.specs, jax.random.key(0))
    with pytest.raises(UserError, match="DoRA"):
        paged.factors_of(tree, model.specs, "folder")
    broken = jax.tree.map(lambda x: x * jnp.inf, adapted(model, base, "d"))
    with pytest.raises(UserError, match="not finite"):
        paged.factors_of(broken, model.specs, "folder")
    with pytest.raises(UserError, match="no LoRA"):
        paged.factors_of(base, model.specs, "folder")


# --- from folders to answers ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a LoRA run on it and a PEFT folder for it."""
    from train.main import main

    folder = tmp_path_factory.mktemp("folders")
    model, base, trees = make()
    export_hf(model, base, load_tokenizer("bytes"), folder / "model", check=False)
    peft_write.write(folder / "peft", model, trees["c"], str(folder / "model"))
    small = {
        "steps": 2, "data.source": "synthetic:add?n=200&digits=1", "samples": "()", "model.shape": "",
        "init": folder / "model", "optim.lr": 0.1, "data.tokenizer": "bytes",
    }  # fmt: skip
    flags = [f"--config.{k}={v}" for k, v in small.items()]
    assert main(["--config=configs/peft/lora_tiny.py", f"--workdir={folder / 'run'}", *flags]) == 0
    return folder


@pytest.mark.slow
def test_folders_of_both_kinds_answer_in_one_batch(folders):
    names = {"run": folders / "run", "peft": folders / "peft"}
    lm = load_many(folders / "model", names)
    prompts, order = ["2+3=", "2+3=", "2+3=", "1+1="], ["peft", None, "run", "run"]
    one = lambda name, p: load(folders / "model", names.get(name)).generate(p, max_new_tokens=8)[0]
    answers = lm.generate(prompts, adapters=order, max_new_tokens=8)
    assert answers == [one(name, p) for name, p in zip(order, prompts)]
    assert len(set(answers[:3])) == 3
    assert "".join(lm.stream("2+3=", adapter="run", max_new_tokens=8)) == answers[2]
    with pytest.raises(UserError, match="adapters for 2 prompts"):
        lm.generate(["a", "b"], adapters=["run"])
    with pytest.raises(UserError, match="without adapters"):
        load(folders / "model").generate(["a"], adapters=["run"])


@pytest.mark.slow
def test_a_run_on_another_base_is_refused(folders, tmp_path):
    model, base, _ = make()
    export_hf(model, jax.tree.map(lambda x: x * 1.5, base), load_tokenizer("bytes"), tmp_path / "other", check=False)
    with pytest.raises(UserError, match="another base"):
        load_many(tmp_path / "other", {"run": folders / "run"})


@pytest.mark.slow
def test_chat_picks_an_adapter(folders, capsys, monkeypatch):
    from tools import chat

    talk = chat.Chat(load_many(folders / "model", {"run": folders / "run", "peft": folders / "peft"}), "", {
        "temperature": 0.0, "max_new_tokens": 8})  # fmt: skip
    lines = iter(["2+3=", "/reset", "/adapter", "2+3=", "/adapter nobody", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert chat.converse(talk) == 0
    out, err = capsys.readouterr()
    tuned, plain = (talk.lm.generate("2+3=", adapters=[a], max_new_tokens=8)[0] for a in ("run", None))
    assert tuned != plain and out.startswith(tuned) and plain in out
    assert "the base answers" in err and "no adapter 'nobody'; known: run, peft" in err
    with pytest.raises(UserError, match="two adapters"):
        chat.named("x/a,y/a")
    assert chat.named("x/a,b=y/a") == {"a": "x/a", "b": "y/a"}
