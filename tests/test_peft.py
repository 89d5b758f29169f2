"""Adapters by hand, in training, in decoding, on disk; and sums of updates."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from evals import spectrum
from infer.generate import generate, unrolled
from infer.models import before_and_after, load
from model import build, vectors, weights
from model.config import ModelConfig
from model.io import peft_read, peft_write
from model.io.export import export_hf
from model.net.transformer import Transformer, unstack
from model.peft import bottleneck, dora, ia3, lora, oft, prefix, prompt
from model.weights import Spec
from tests.helpers.models import METHODS, rand
from tests.helpers.steps import config, losses, mesh_of, rows
from train import init
from train.cost import cost
from train.mesh import RULES
from train.step import make_step

SMALL = ModelConfig(
    vocab_size=320, layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, max_len=128, tied=True
)  # fmt: skip
EQN = "BTD,DF->BTF"
MAKES = {
    "lora": lora.make(rank=4),
    "dora": dora.make(rank=4),
    "ia3": ia3.make(),
    "oft": oft.make(block=8),
    "sequential": bottleneck.make(rank=4),
    "parallel": bottleneck.make(rank=4, kind="parallel"),
    "prefix": prefix.make(tokens=3),
    "prompt": prompt.make(tokens=3),
}


@pytest.fixture(scope="module")
def small():
    model = Transformer(SMALL)
    params = jax.jit(model.init)(jax.random.key(1))
    params["embed"]["table"] *= 4
    return model, params


def adapted(small, make, noise=0.1):
    """The model's parameters with every adapter parameter moved."""
    model, params = small
    out = make(params, model.specs, jax.random.key(2))
    train, frozen = weights.partition(out, weights.trainable(out, "adapters"))
    return weights.combine(jax.tree.map(lambda x: x + noise * rand(*x.shape, seed=3), train), frozen)


def tokens(*shape):
    return np.random.default_rng(0).integers(0, 320, shape).astype(np.int32)


def spec_of(shape, eqn=EQN):
    names = tuple(weights.AXES[c] for c in weights.operands(eqn)[1])
    return Spec(jax.ShapeDtypeStruct(shape, jnp.float32), names, eqn=eqn)


# --- by hand: x = [1, 2] unless said otherwise ---

X = jnp.array([[[1.0, 2.0]]])


def by_hand(leaf, wanted, x=X, eqn=EQN):
    np.testing.assert_allclose(weights.einsum(eqn, x, leaf)[0, 0], wanted, rtol=1e-6)
    dense = leaf.dense(spec_of((2, 2)))
    np.testing.assert_allclose(jnp.einsum(eqn, x, dense)[0, 0], wanted, rtol=1e-5, atol=1e-6)


def test_dora_by_hand():
    """W + s A B = I + 1 * [[3, 0], [4, 0]] with columns [4, 4], [0, 1]: norms sqrt(32), 1; magnitudes 2, 5.

    x (W + s A B) = [12, 2], so y = [12 * 2 / sqrt(32), 2 * 5]. Its norm is a constant to the gradient (section 4.3).
    """
    leaf = dora.DoRA(jnp.eye(2), jnp.array([[3.0], [4.0]]), jnp.array([[1.0, 0.0]]), EQN, 1.0)
    leaf = leaf.replace(magnitude=jnp.array([2.0, 5.0]), squares=jnp.ones(2))
    by_hand(leaf, [12 * 2 / math.sqrt(32), 10.0])
    grad = jax.grad(lambda b: weights.einsum(EQN, X, leaf.replace(b=b))[0, 0, 0])(leaf.b)
    np.testing.assert_allclose(grad[0, 0], 11 * 2 / math.sqrt(32), rtol=1e-6)  # x A = 11


def test_ia3_by_hand():
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    by_hand(ia3.IA3(w, jnp.array([2.0, 3.0]), "F"), [14.0, 30.0])  # x W = [7, 10]
    by_hand(ia3.IA3(w, jnp.array([2.0, 3.0]), "D"), [20.0, 28.0])  # [2, 6] W


def test_oft_by_hand():
    """Q = [[0, t], [-t, 0]], t = 1/2: (I - Q)(I + Q)^-1 turns by 2 atan(t): cos 3/5, sin 4/5.

    The series of three terms, I + 2 Q + Q^2, is [[1 - t^2, 2 t], [-2 t, 1 - t^2]].
    """
    q = jnp.array([[0.5]])
    by_hand(oft.OFT(jnp.eye(2), q, "D", 0), [0.6 + 2 * 0.8, -0.8 + 2 * 0.6])
    by_hand(oft.OFT(jnp.eye(2), q, "D", 3), [0.75 - 2 * 1.0, 1.0 + 2 * 0.75])
    turn = oft.OFT(jnp.eye(8), 0.3 * rand(2, 6), "D", 0).rotation()
    np.testing.assert_allclose(turn @ jnp.swapaxes(turn, -1, -2), jnp.stack([jnp.eye(4)] * 2), atol=1e-6)


def test_bottleneck_by_hand():
    """D = [1, -1]^T and U = [3, 0]. Sequential: y D = 3, y + 9; parallel: x D = -1, which relu stops."""
    node = bottleneck.Bottleneck(jnp.array([[1.0], [-1.0]]), jnp.array([[3.0, 0.0]]), False, 1.0)
    y = jnp.array([[[5.0, 2.0]]])
    np.testing.assert_array_equal(node(X, y)[0, 0], [14.0, 2.0])
    np.testing.assert_array_equal(node.replace(parallel=True)(X, y)[0, 0], [5.0, 2.0])
    np.testing.assert_array_equal(node.replace(parallel=True, scale=2.0)(-X, y)[0, 0], [11.0, 2.0])


# --- options of LoRA ---


def test_ranks_and_alphas_by_path(small):
    model, params = small
    make = lora.make(rank=4, alpha=8.0, ranks=((".*/w[qk]", 2),), alphas=((".*/wq", 6.0),), rslora=True)
    layers = make(params, model.specs, jax.random.key(0))["layers"]
    found = {n: (layers["attn"][n].a.shape[-1], layers["attn"][n].scale) for n in ("wq", "wk", "wv")}
    assert found == {"wq": (2, 6 / 2**0.5), "wk": (2, 8 / 2**0.5), "wv": (4, 4.0)}


def test_pissa_starts_at_the_largest_singular_vectors_and_keeps_the_base(small):
    model, params = small
    out = lora.make(rank=4, alpha=8.0, init="pissa")(params, model.specs, jax.random.key(0))
    leaf = out["layers"]["mlp"]["down"]
    u, s, v = np.linalg.svd(params["layers"]["mlp"]["down"], full_matrices=False)
    top = (u[..., :4] * s[:, None, :4]) @ v[:, :4]
    np.testing.assert_allclose(leaf.scale * leaf.a @ leaf.b, top, atol=1e-4)
    np.testing.assert_array_equal(jax.jit(model)(out, tokens(1, 8)), jax.jit(model)(params, tokens(1, 8)))
    moved = leaf.replace(b=leaf.b + 0.1 * rand(*leaf.b.shape))
    x, spec = rand(2, 5, 64), model.specs["layers"]["mlp"]["down"]
    first = jax.tree.map(lambda w: w[0], moved)
    np.testing.assert_allclose(weights.einsum("BTF,FD->BTD", x, first), x @ moved.dense(spec)[0], atol=1e-4)
    assert weights.underived(out)["layers"]["mlp"]["down"].start is None  # another machine's SVD rounds otherwise


def test_orthogonal_start_adds_nothing(small):
    model, params = small
    leaf = lora.make(rank=4, init="orthogonal")(params, model.specs, jax.random.key(0))["layers"]["attn"]["wq"]
    assert float(jnp.abs(leaf.a).min()) > 0 and float(jnp.abs(leaf.b).max()) > 0.01
    np.testing.assert_allclose(leaf.delta(), 0, atol=1e-6)
    with pytest.raises(ValueError, match="even rank"):
        lora.make(rank=3, init="orthogonal")(params, model.specs, jax.random.key(0))


def test_dropout_is_noise_in_training_alone(small):
    """Every layer draws its own, a seed repeats it, its mean is the leaf without, and the tied head has it too."""
    model, _ = small
    params = adapted(small, lora.make(rank=4, dropout=0.5, where=".*"))
    step = jnp.int32(0)
    noisy = [weights.in_training(params, jax.random.key(i), step) for i in (0, 0, 1)]
    a, b, c = (jax.jit(model)(p, tokens(1, 8)) for p in noisy)
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    noise = noisy[0]["layers"]["attn"]["wq"].noise
    assert noise.shape[0] == 2 and (noise[0] != noise[1]).any()
    leaf, x = params["embed"]["table"], jnp.ones((1, 1, 32))
    product = lambda key: weights.einsum("BTD,VD->BTV", x, leaf.in_training(key, step))
    mean = jax.jit(jax.vmap(product))(jax.random.split(jax.random.key(5), 4000)).mean(0)
    np.testing.assert_allclose(mean, weights.einsum("BTD,VD->BTV", x, leaf), atol=0.1)


@pytest.mark.slow
def test_training_with_dropout():
    curve, state = losses(config(**{"peft.name": "lora", "peft.dropout": 0.3, "peft.where": ".*"}), steps=4)
    assert np.isfinite(curve).all() and int(state.skipped) == 0 and curve[-1] < curve[0]


def test_lora_training_does_not_depend_on_how_alpha_and_the_starts_share_a_factor():
    """alpha -> alpha / (p q), A0 -> p A0, LR_A -> p LR_A, LR_B -> q LR_B under Adam with eps -> 0: the same training.

    p = 4 and q = 1/2 are powers of two: all that differs is where the compiler fuses a product with a sum.
    """

    def curve(p, q, scaled=True):
        c = config(**{"peft.name": "lora", "peft.alpha": 8.0 / (p * q), "optim.eps": 1e-30, "optim.clip": 0.0})
        c.optim.lr_scale = ((".*/a", p), (".*/b", q)) if scaled else ()
        c.model.layers = 1
        mesh = mesh_of(1, 1, 1)
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            plan = init.blueprint(c, build.model(c, None, 500), mesh)
            state = init.first_state(c, plan, None)
            larger = lambda name, x: x * p if name.endswith("/a") else x
            state = state.replace(params=weights.map_named(larger, state.params))
            step, out = jax.jit(make_step(plan.objective.loss, plan.tx)), []
            for _ in range(4):
                state, m = step(state, rows())
                out.append(float(m["loss"][0]))
        return out

    plain = curve(1.0, 1.0)
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(curve(4.0, 0.5), plain, rtol=1e-6)
    assert abs(curve(4.0, 0.5, scaled=False)[-1] - plain[-1]) > 1e-4 * plain[-1]


# --- decoding, packing, cost, sharding ---


@pytest.mark.parametrize(
    "method", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("dora", "parallel")), "prefix", "prompt"]
)
def test_decoding_with_a_cache_is_the_full_forward_pass(small, method):
    model, params = small[0], adapted(small, MAKES[method], noise=0.5)
    prompts = [[5, 9, 2, 44, 17], [12]]
    out = generate(model, params, prompts, max_new_tokens=4)
    forward = jax.jit(model)
    for prompt_, new, logps in zip(prompts, out.tokens, out.logps):
        row = np.zeros((1, 12), np.int32)
        row[0, : len(prompt_) + 4] = prompt_ + new
        full = jax.nn.log_softmax(forward(params, row)[0])[len(prompt_) - 1 : len(prompt_) + 3]
        assert full.argmax(-1).tolist() == new
        np.testing.assert_allclose(full.max(-1), logps, atol=1e-4)
    if method == "prefix":  # what stands at the start of the cache is rounded too
        rounded = generate(model, params, prompts, max_new_tokens=4, cache="int8")
        np.testing.assert_allclose(np.stack(rounded.logps), np.stack(out.logps), atol=0.05)


@pytest.mark.parametrize("method", ["dora", "oft"])
def test_a_step_does_not_compute_again_what_follows_from_the_arrays(small, method):
    """Norms and rotations: a token takes half the operations or less, and has the same logits."""
    model, params = small[0], adapted(small, MAKES[method])
    step = lambda p: jax.jit(model.__call__).lower(p, tokens(1, 1)).compile()
    before, after = unstack(params, model.config), unrolled(model, params)
    np.testing.assert_allclose(step(before)(before, tokens(1, 1)), step(after)(after, tokens(1, 1)), atol=1e-4)
    assert step(after).cost_analysis()["flops"] < 0.5 * step(before).cost_analysis()["flops"]


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_packed_documents_each_see_the_virtual_tokens_and_not_each_other(small, method):
    model, params = small[0], adapted(small, MAKES[method], noise=0.5)
    apart = tokens(2, 6)
    packed = apart.reshape(1, 12)
    segments = np.repeat([[1, 2]], 6, 1).reshape(1, 12)
    positions = np.tile(np.arange(6), 2)[None]
    both = jax.jit(model)(params, packed, positions, segments).reshape(2, 6, -1)
    np.testing.assert_allclose(both, jax.jit(model)(params, apart), atol=1e-4)


def test_a_prompt_is_its_tokens_when_its_embeddings_are_theirs(small):
    """Virtual tokens with the embeddings of real ones do what these would have done in front of the text."""
    model, params = small
    text = tokens(2, 9)
    text[:, :3] = text[0, :3]
    node = prompt.Prompt(params["embed"]["table"][text[0, :3]])
    with_prompt = jax.jit(model)({**params, "prompt": node}, text[:, 3:])
    np.testing.assert_allclose(with_prompt, jax.jit(model)(params, text)[:, 3:], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", MAKES)
def test_flops_are_those_of_the_compiled_step(small, method):
    model = Transformer(ModelConfig(**{**SMALL.to_dict(), "embed": 128, "mlp": 512, "head_dim": 32}), remat="none")
    params = MAKES[method](model.init(jax.random.key(0)), model.specs, jax.random.key(1))
    mask = weights.trainable(params, "adapters")
    train, frozen = weights.partition(params, mask)
    ids = tokens(8, 64)

    def loss(train, frozen):
        whole = unstack(weights.combine(train, frozen), model.config)
        return model.logits(whole, model.hidden(whole, ids)[0]).mean()

    compiled = jax.jit(jax.grad(loss)).lower(train, frozen).compile().cost_analysis()["flops"]
    equations = cost(model.config, params, model.specs, mask, 64).step(ids.size, ids.size)
    np.testing.assert_allclose(equations, compiled, rtol=0.15)  # softmax, norms, full attention; DoRA's norms


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_same_losses_when_sharded(method):
    c = config(**{"peft.name": method, "model.heads": 8, "model.kv_heads": 8})
    one, _ = losses(c, steps=3)
    many, _ = losses(c, (2, 2, 2), steps=3)
    assert one[-1] < one[0]
    np.testing.assert_allclose(many, one, rtol=2e-5)


# --- on disk ---


@pytest.mark.parametrize("method", [m for m in MAKES if m not in ("sequential", "parallel")])
def test_a_peft_folder_gives_back_what_was_written(small, method, tmp_path):
    model, params = small
    wanted = adapted(small, MAKES[method])
    peft_write.write(tmp_path / "out", model, wanted, "some/base")
    again = peft_read.read(tmp_path / "out")(params, model.specs, jax.random.key(0))
    assert json.loads((tmp_path / "out" / peft_read.CONFIG).read_text())["base_model_name_or_path"] == "some/base"
    same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6)
    jax.tree.map(same, *(weights.partition(p, weights.trainable(p, "adapters"))[0] for p in (wanted, again)))


def test_tensors_for_modules_that_the_config_does_not_name_stay_unused(small, tmp_path, caplog):
    """As in PEFT, which this says in a line; and a pickle is refused with what converts it."""
    model, params = small
    wanted = adapted(small, MAKES["lora"])
    peft_write.write(tmp_path / "out", model, wanted)
    spoil(tmp_path / "out", exclude_modules=r".*\.layers\.0\..*")
    out = peft_read.read(tmp_path / "out")(params, model.specs, jax.random.key(0))
    found = out["layers"]["attn"]["wq"].b
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1], wanted["layers"]["attn"]["wq"].b[1], rtol=1e-6)
    assert "does not name the modules of" in caplog.text and "base_model.model.model.layers" in caplog.text
    (tmp_path / "out" / peft_read.TENSORS).rename(tmp_path / "out/adapter_model.bin")
    with pytest.raises(UserError, match=r"only a pickle.*save_file"):
        peft_read.read(tmp_path / "out")


def test_bottleneck_adapters_have_no_peft_format(small, tmp_path):
    with pytest.raises(UserError, match="no format for these adapters: Bottleneck"):
        peft_write.write(tmp_path / "out", small[0], adapted(small, MAKES["parallel"]))
    assert not (tmp_path / "out").exists()


def spoil(folder, **changes):
    path = folder / peft_read.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "some"}, "bias='some' is not a value that PEFT knows"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "repeats a pattern"),
        ({"target_modules": "("}, "is refused: missing"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow=3 is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"peft_type": "LOHA"}, "PEFT type 'LOHA' is not supported"),
        ({"use_dora": True}, "lora_magnitude_vector.* is missing"),
    ],
)
def test_what_would_change_the_result_is_refused(small, tmp_path, changes, message):
    model, params = small
    peft_write.write(tmp_path / "out", model, adapted(small, MAKES["lora"]))
    spoil(tmp_path / "out", **changes)
    with pytest.raises(UserError, match=message):
        peft_read.read(tmp_path / "out")(params, model.specs, jax.random.key(0))


def test_tensors_that_do_not_fit_are_refused(small, tmp_path):
    from safetensors.numpy import load_file, save_file

    model, params = small
    peft_write.write(tmp_path / "out", model, adapted(small, MAKES["lora"]))
    file = tmp_path / "out" / peft_read.TENSORS
    whole = load_file(file)
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
    cases = {
        "has no parameter for": whole | {name.format(7): whole[name.format(0)]},
        "has shape": whole | {name.format(0): whole[name.format(0)][:, :-1].copy()},
        "one of lora_A and lora_B is missing": {n: x for n, x in whole.items() if n != name.format(1)},
    }
    for message, tensors in cases.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            peft_read.read(tmp_path / "out")(params, model.specs, jax.random.key(0))


# --- updates ---


def test_task_arithmetic_by_hand():
    a, b = {"w": np.float32([1, 2])}, {"w": np.float32([3, -4])}
    np.testing.assert_array_equal(vectors.linear([a, b], [2.0, -0.5])["w"], [0.5, 6.0])


def test_ties_by_hand():
    """Two thirds are kept: a = [3, -2, .], b = [-1, -4, .], c = [., 6, 2]. Totals 2, 0, 2 elect +, none, +.

    The means of those that agree: 3 (b's -1 is left out), 0, 2.
    """
    a, b, c = (
        {"w": np.float32(x[:2]), "v": np.float32(x[2:])} for x in ([3, -2, 0.5], [-1, -4, 0.1], [1, 6, 2])
    )  # fmt: skip
    out = vectors.ties([a, b, c], [1.0, 1.0, 1.0], 2 / 3)
    np.testing.assert_array_equal(np.concatenate([out["w"], out["v"]]), [3, 0, 2])
    halved = vectors.ties([a, b, c], [0.5, 0.5, 0.5], 2 / 3)
    np.testing.assert_array_equal(halved["w"], [1.5, 0])


def test_dare_by_hand():
    """numpy's default_rng(0) starts 0.637, 0.270, 0.041, 0.017: at density 1/2 the last three stay, doubled."""
    out = vectors.dare([{"w": np.float32([1, 2, 3, 4])}], [1.0], 0.5, seed=0)
    np.testing.assert_array_equal(out["w"], [0, 4, 6, 8])
    many = vectors.dare([{"w": np.ones(100_000, np.float32)}], [3.0], 0.2, seed=1)["w"]
    assert set(np.unique(many)) == {0.0, 15.0} and abs(many.mean() - 3) < 0.1


def test_an_update_as_lora_misses_what_its_singular_values_say(small):
    model, params = small
    u, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 3)))
    v, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 3)))
    zero = vectors.difference(params, params, model.specs)
    change_ = dict(zero, **{"layers/mlp/up": np.stack([(u * [3, 2, 1]) @ v.T] * 2).astype(np.float32)})
    out, missed = vectors.to_lora(params, change_, model.specs, 2)
    np.testing.assert_allclose(missed["layers/mlp/up"], (2 * 1, 2 * 14), rtol=1e-5)
    delta = np.asarray(out["layers"]["mlp"]["up"].delta() - change_["layers/mlp/up"])
    np.testing.assert_allclose((delta**2).sum(), 2, rtol=1e-4)
    with pytest.raises(UserError, match="zero everywhere"):
        vectors.to_lora(params, zero, model.specs, 2)


def test_figures_of_a_change_by_hand():
    """W = diag(4, 1, 1), dW = 3 e2 e3^T + 1 e1 e1^T: norms sqrt(18), sqrt(10); <W, W + dW> = 5 * 4 + 1 + 1 = 22.

    Singular values 3, 1: effective rank exp(-(3/4 ln 3/4 + 1/4 ln 1/4)), stable rank 10/9, one holds 90 % of 10.
    """
    w = jnp.diag(jnp.array([4.0, 1.0, 1.0]))
    delta = jnp.zeros((3, 3)).at[1, 2].set(3.0).at[0, 0].set(1.0)
    f = {k: float(x) for k, x in spectrum.figures(w, delta).items()}
    assert f["relative"] == pytest.approx(math.sqrt(10 / 18), rel=1e-5)
    assert f["cosine"] == pytest.approx(22 / math.sqrt(18 * 36), rel=1e-5)
    assert f["effective_rank"] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))), rel=1e-4)
    assert f["stable_rank"] == pytest.approx(10 / 9, rel=1e-5) and f["rank_90"] == 1


def test_intruders_are_directions_that_the_base_does_not_have():
    """W spans 20 of 40 output directions; a strong dW into a new one is an intruder, one into an old one is not."""
    w = jnp.zeros((40, 40)).at[jnp.arange(20), jnp.arange(20)].set(jnp.linspace(2, 1, 20))
    known = spectrum.figures(w, jnp.zeros((40, 40)).at[0, 3].set(9.0))
    new = spectrum.figures(w[:20], jnp.zeros((20, 40)).at[0, 30].set(9.0))
    assert float(known["intruders"]) == 0 and float(new["intruders"]) == 1


# --- from folder to folder ---


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    """A base and two adapters of it, as folders."""
    from data.text.formats import load as load_tokenizer

    model, params = small
    root = tmp_path_factory.mktemp("folders")
    export_hf(model, params, load_tokenizer("bytes"), root / "base", check=False)
    for name, seed in (("a", 0), ("b", 1)):
        out = lora.make(rank=2, where="layers/mlp/.*")(params, model.specs, jax.random.key(seed))
        filled = lambda at, x, seed=seed: 0.1 * rand(*x.shape, seed=seed) if at.endswith("/b") else x
        peft_write.write(root / name, model, weights.map_named(filled, out), str(root / "base"))
    return root


def test_edit_adds_and_takes_away(folders, capsys):
    from tools import edit, export

    base, a, b = (str(folders / n) for n in ("base", "a", "b"))
    assert edit.main([f"--base={base}", f"--to={folders}/sum", a, f"{b}:0.5"]) == 0
    assert edit.main([f"--base={base}", f"--to={folders}/back", f"{folders}/sum", f"{b}:-0.5", "--rank=2"]) == 0
    said = capsys.readouterr().out
    assert "rank 2 leaves out 0.0" in said  # what is left is a's rank 2
    x = tokens(1, 12)
    np.testing.assert_allclose(load(base, f"{folders}/back").logits(x), load(base, a).logits(x), atol=1e-3)
    assert np.abs(load(base, a).logits(x) - load(f"{folders}/sum").logits(x)).max() > 1e-2
    assert edit.main([f"--base={base}", f"--to={folders}/sum", a]) == 2
    assert export.main([f"--from={base}", f"--adapter={a}", f"--to={folders}/merged"]) == 0
    np.testing.assert_allclose(load(f"{folders}/merged").logits(x), load(base, a).logits(x), atol=1e-3)


def test_change_of_an_adapter(folders, capsys):
    out = folders / "change.jsonl"
    assert spectrum.main([str(folders / "a"), f"--base={folders}/base", f"--out={out}"]) == 0
    rows_ = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows_) == 6 and all(row["effective_rank"] <= 2 + 1e-3 for row in rows_)  # 3 matrices of 2 layers
    values = 4 * 2 * (2 * (32 * 2 + 2 * 64) + (64 * 2 + 2 * 32))
    assert f"adapter {values / 1e6:.2f} MB" in capsys.readouterr().out
    assert spectrum.main([str(folders / "a")]) == 2
    lm, before = before_and_after(folders / "a", folders / "base")
    np.testing.assert_array_equal(before["layers"]["mlp"]["up"], lm.params["layers"]["mlp"]["up"].base)


@pytest.mark.slow
def test_the_life_of_an_adapter(folders, tmp_path, capsys):
    """SFT, its adapter as a PEFT folder, the same adapter on in DPO from the run and from the folder."""
    from configs import schema
    from tools import export
    from train.main import run

    def train(name, *argv):
        common = ["steps=3", "data.tokenizer=bytes", "model.shape=", "eval_batches=1", "samples=()", "log_every=1"]
        argv = [*argv, f"--workdir={tmp_path / name}", f"--config.init={folders / 'base'}"]
        assert run(schema.load(argv + [f"--config.{pair}" for pair in common])) == 0
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == "train"]

    train("sft", "--config=configs/peft/lora_tiny.py")
    assert export.main([f"--from={tmp_path / 'sft'}", f"--to={tmp_path / 'peft'}", "--adapter-only"]) == 0
    x, base = tokens(1, 12), folders / "base"
    np.testing.assert_allclose(load(base, tmp_path / "peft").logits(x), load(tmp_path / "sft").logits(x), atol=1e-4)
    saved = lambda kind: ("--config.peft.name=saved", f"--config.peft.folder={tmp_path / kind}")
    curves = [train(f"dpo_{kind}", "--config=configs/rlhf/dpo_tiny.py", *saved(kind)) for kind in ("sft", "peft")]
    for curve in curves:
        assert curve[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the reference is the adapter as it was
    np.testing.assert_allclose(*([line["loss"] for line in curve] for curve in curves), rtol=1e-4)
    after = load(tmp_path / "dpo_sft")
    np.testing.assert_array_equal(
        weights.base(after.params)["layers"]["attn"]["wq"], load(base).params["layers"]["attn"]["wq"]
    )
    assert np.abs(after.logits(x) - load(tmp_path / "sft").logits(x)).max() > 1e-5
