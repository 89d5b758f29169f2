"""Recurrent layers: the RG-LRU of Griffin (De et al. 2024, arXiv 2402.19427), alone or between layers of attention.

Layers of several kinds are stacked by what they have: norms and MLPs over all layers, "attn" and "recurrent" over the
layers of that kind. So a method finds "layers/attn/wq" where it is in any model.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from model import weights
from model.config import ModelConfig
from model.net.layers import ACTIVATIONS, Block, Layer
from model.weights import Params

SHARPNESS = 8.0  # c of eq. 6
DECAYS = (0.9, 0.999)  # a^c at init is uniform between them
STEEPEST = 1000.0  # slope of the square root of eq. 4, which has none at a = 1


class Recurrent(Layer):
    """out(act(x gate) * RG-LRU(conv(x in))). With a cache it goes on from the state that earlier calls have left."""

    @nn.compact
    def __call__(self, x: Array, context: dict, cache: dict | None, windowed: Any) -> tuple[Array, dict | None]:
        c, age = self.config, context["age"]
        before = cache or initial(c, (x.shape[0],), x.dtype)
        gate = weights.einsum("BTD,DW->BTW", x, self.weight("gate", "BTD,DW->BTW"))
        u = weights.einsum("BTD,DW->BTW", x, self.weight("in", "BTD,DW->BTW"))
        u, inputs = self.convolve(self.bias("bin", "W", u, True), age, before["inputs"].astype(x.dtype))
        h, state = self.rg_lru(u, age, before["state"])
        h = h * ACTIVATIONS[c.act](self.bias("bgate", "W", gate, True))
        y = weights.einsum("BTW,WD->BTD", h, self.weight("out", "BTW,WD->BTD", (2 * c.layers) ** -0.5))
        return self.bias("bout", "D", y, True), cache and {"state": state, "inputs": inputs}

    def convolve(self, u: Array, age: Array, before: Array) -> tuple[Array, Array]:
        """Causal depthwise convolution of u [B,T,W] within a document, and the inputs that the next call needs.

        `age` [B,T] counts the tokens of the document before each token; `before` [B,C-1,W] are earlier inputs.
        """
        taps, T = self.config.conv, u.shape[1]
        w = self._declare("conv", "CW", nn.initializers.normal(taps**-0.5), "").astype(u.dtype)
        padded = jnp.concatenate([before, u], 1)
        back = lambda n: jnp.where((age >= n)[..., None], padded[:, taps - 1 - n :][:, :T], 0)  # inputs n tokens ago
        y = sum(w[taps - 1 - n] * back(n) for n in range(taps))
        return self.bias("bconv", "W", y, True), padded[:, T:]

    def rg_lru(self, x: Array, age: Array, before: Array) -> tuple[Array, Array]:
        """Eq. 1 to 4, in float32: h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t) of x [B,T,W], and the last h [B,W].

        A document's first token has a_t = 0, and its input is not scaled. Gates see a block of x each.
        """
        blocks = x.reshape(*x.shape[:2], self.config.heads, -1)  # [B,T,N,I]

        def gate(name: str) -> Array:
            z = weights.einsum("BTNI,NIJ->BTNJ", blocks, self.weight(name, "BTNI,NIJ->BTNJ"))
            return jax.nn.sigmoid(self.bias(f"b{name}", "NJ", z, True).astype(jnp.float32)).reshape(x.shape)

        log_a = -SHARPNESS * gate("recurrence") * jax.nn.softplus(self._declare("decay", "W", _decays, ""))  # eq. 6
        first = (age == 0)[..., None]
        a = jnp.where(first, 0, jnp.exp(log_a))
        scale = jnp.where(first, 1, root(-jnp.expm1(2 * log_a)))
        inputs = scale * gate("input") * x
        inputs = inputs.at[:, 0].add(a[:, 0] * before)
        follow = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
        _, h = jax.lax.associative_scan(follow, (a, inputs), axis=1)
        return h.astype(x.dtype), h[:, -1]


class RecurrentBlock(Block):
    """A Block whose tokens see each other through a state."""

    def mix(self, h: Array, context: dict, cache: dict | None, windowed: Any) -> tuple[Array, dict | None]:
        return Recurrent(self.config, name="recurrent")(h, context, cache, windowed)


BLOCKS = {"attn": Block, "recurrent": RecurrentBlock}


def block_of(config: ModelConfig, params: Params) -> Block:
    """The module that computes a layer with these parameters."""
    return BLOCKS["recurrent" if "recurrent" in params else "attn"](config)


def initial(config: ModelConfig, lead: tuple[int, ...], dtype: Any) -> dict[str, Array]:
    """What a recurrent layer remembers before the first token: the state [lead..., W] and inputs [lead..., C-1, W]."""
    W = config.recurrent
    return {"state": jnp.zeros((*lead, W)), "inputs": jnp.zeros((*lead, config.conv - 1, W), dtype)}


@jax.custom_jvp
def root(x: Array) -> Array:
    """sqrt(x) whose slope is at most STEEPEST."""
    return jnp.sqrt(x)


@root.defjvp
def _root_slope(x: tuple[Array], dx: tuple[Array]) -> tuple[Array, Array]:
    return jnp.sqrt(x[0]), dx[0] / (2 * jnp.sqrt(jnp.maximum(x[0], (2 * STEEPEST) ** -2)))


def _decays(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The parameter L with a^c = exp(-c softplus(L)) uniform between DECAYS (section 2.4)."""
    a = jax.random.uniform(key, shape, dtype, *DECAYS)
    return jnp.log(jnp.expm1(-jnp.log(a) / SHARPNESS))


# --- layers of several kinds ---


def join(stacks: dict[str, Params], config: ModelConfig) -> Params:
    """{kind: parameters stacked over its layers} as one tree; what several kinds have is stacked over all layers."""
    order = np.argsort(np.concatenate([config.stack(f"layers/{kind}") for kind in stacks]))
    parts = {part: [s[part] for s in stacks.values() if part in s] for s in stacks.values() for part in s}
    whole = lambda *xs: xs[0] if len(xs) < len(stacks) or len(stacks) == 1 else jnp.concatenate(xs)[order]
    return {part: jax.tree.map(whole, *trees) for part, trees in parts.items()}


def pick(stacked: Params, kinds: tuple[str, ...], i: int) -> Params:
    """Layer i of stacked parameters; `kinds` are those of the layers."""
    at = lambda part: kinds[:i].count(part) if part in BLOCKS else i
    mine = lambda part: part not in BLOCKS or part == kinds[i]
    return {part: jax.tree.map(lambda x: x[at(part)], tree) for part, tree in stacked.items() if mine(part)}  # noqa: B023


def scan(block: Callable, x: Array, layers: Params, kv: Any, windowed: Array, config: ModelConfig) -> tuple[Array, Any]:
    """`block(x, parameters, cache, windowed) -> x, cache` over stacked layers; `kv` is a cache by kind, or None.

    Where layers are of several kinds, a turn of the loop takes a period of them; what does not fill one comes behind.
    """
    if len(set(config.kinds)) == 1:
        return jax.lax.scan(lambda x, xs: block(x, *xs), x, (layers, kv, windowed))
    period, (turns, left) = config.blocks, divmod(config.layers, len(config.blocks))
    held = lambda part: period.count(part) if part in BLOCKS else len(period)  # of a stack, by a turn
    each = lambda f, tree: {part: jax.tree.map(lambda a: f(a, held(part)), t) for part, t in tree.items()}  # noqa: B023
    stacks = (layers, kv or {}, {"windowed": windowed})
    whole = [each(lambda a, n: a[: turns * n].reshape(turns, n, *a.shape[1:]), tree) for tree in stacks]
    rest = [each(lambda a, n: a[turns * n :], tree) for tree in stacks]

    def run(x: Array, stacks: Any, kinds: tuple[str, ...]) -> tuple[Array, dict]:
        layers, kv, flags = stacks
        new = {kind: [] for kind in kv}
        for i, kind in enumerate(kinds):
            x, cache = block(x, pick(layers, kinds, i), pick(kv, kinds, i).get(kind), flags["windowed"][i])
            if kv:
                new[kind].append(cache)
        return x, {kind: jax.tree.map(lambda *a: jnp.stack(a), *caches) for kind, caches in new.items() if caches}

    x, looped = jax.lax.scan(lambda x, xs: run(x, xs, period), x, whole)
    x, last = run(x, rest, period[:left])
    flat = {kind: jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree) for kind, tree in looped.items()}
    behind = lambda *a: jnp.concatenate(a)
    kv = {kind: jax.tree.map(behind, t, last[kind]) if kind in last else t for kind, t in flat.items()}
    return x, kv or None
