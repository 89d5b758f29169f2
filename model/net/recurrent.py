"""Recurrent layers with the RG-LRU of Griffin (De et al. 2024, arXiv 2402.19427).

A model may have both recurrent layers and attention layers.
"""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.config import ModelConfig
from model.net.attention import Context
from model.net.layers import ACTIVATIONS, Block, Layer

SHARPNESS = 8.0  # c of eq. 6
DECAYS = (0.9, 0.999)  # range of the initial decay factors a^c, which are drawn uniformly
STEEPEST = 1000.0  # upper limit on the derivative of the square root in eq. 4, which is infinite at a = 1


class Memory(NamedTuple):
    """The cache of a recurrent layer."""

    inputs: Array  # [B,C-1,W], the last C - 1 inputs of the convolution
    state: Array  # [B,W]


class Recurrent(Layer):
    """The recurrent sublayer, from x [B,T,D] to [B,T,D]. It computes out(act(gate(x)) * RG-LRU(conv(in(x)))).

    If there is a cache, the recurrence continues from the state of the previous call.
    """

    @nn.compact
    def __call__(self, x: Array, context: Context, cache: Memory | None) -> tuple[Array, Memory | None]:
        c, age = self.config, context.age
        before = initial(c, (x.shape[0],), x.dtype) if cache is None else cache
        gate = weights.einsum("BTD,DW->BTW", x, self.weight("gate", "BTD,DW->BTW"))
        u = weights.einsum("BTD,DW->BTW", x, self.weight("in", "BTD,DW->BTW"))
        u, inputs = self.convolve(self.bias("bin", "W", u, True), age, before.inputs.astype(x.dtype))
        h, state = self.rg_lru(u, age, before.state)
        h = h * ACTIVATIONS[c.act](self.bias("bgate", "W", gate, True))
        y = weights.einsum("BTW,WD->BTD", h, self.weight("out", "BTW,WD->BTD", (2 * c.layers) ** -0.5))
        return self.bias("bout", "D", y, True), None if cache is None else Memory(inputs, state)

    def convolve(self, u: Array, age: Array, before: Array) -> tuple[Array, Array]:
        """Applies a causal depthwise convolution to u [B,T,W].

        Returns (outputs, last inputs); the last inputs are passed to the next call. `before` [B,C-1,W] has the inputs
        that precede u. `age` [B,T] is the number of earlier tokens in the same document. It is used to ignore inputs
        from other documents.
        """
        taps, T = self.config.conv, u.shape[1]
        w = self._declare("conv", "CW", nn.initializers.normal(taps**-0.5), "").astype(u.dtype)
        padded = jnp.concatenate([before, u], 1)

        def back(n: int) -> Array:  # for each token, the input n tokens earlier in its document, or 0
            return jnp.where((age >= n)[..., None], padded[:, taps - 1 - n :][:, :T], 0)

        y = sum(w[taps - 1 - n] * back(n) for n in range(taps))
        ends = (age >= 0).sum(1)[:, None] + jnp.arange(taps - 1)  # columns of the last C - 1 inputs without padding
        return self.bias("bconv", "W", y, True), jnp.take_along_axis(padded, ends[..., None], axis=1)

    def rg_lru(self, x: Array, age: Array, before: Array) -> tuple[Array, Array]:
        """Runs the recurrence on x [B,T,W] in float32. Returns (states h [B,T,W], last state [B,W]).

        Equations 1 to 4 of the paper define h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t). For the first token of a
        document, a_t is 0 and the input is not scaled. For padding, a_t is 1 and the input is 0, so the state does not
        change. The gates' weight matrices are block-diagonal.
        """
        blocks = x.reshape(*x.shape[:2], self.config.heads, -1)  # [B,T,N,I]

        def gate(name: str) -> Array:
            z = weights.einsum("BTNI,NIJ->BTNJ", blocks, self.weight(name, "BTNI,NIJ->BTNJ"))
            return jax.nn.sigmoid(self.bias(f"b{name}", "NJ", z, True).astype(jnp.float32)).reshape(x.shape)

        log_a = -SHARPNESS * gate("recurrence") * jax.nn.softplus(self._declare("decay", "W", _decays, ""))  # eq. 6
        first = (age == 0)[..., None]
        a = jnp.where(first, 0, jnp.exp(log_a))
        scale = jnp.where(first, 1, root(-jnp.expm1(2 * log_a)))
        padding = (age < 0)[..., None]
        a = jnp.where(padding, 1, a)
        inputs = jnp.where(padding, 0, scale * gate("input") * x)
        inputs = inputs.at[:, 0].add(a[:, 0] * before)

        def follow(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = jax.lax.associative_scan(follow, (a, inputs), axis=1)
        return h.astype(x.dtype), h[:, -1]


class RecurrentBlock(Block):
    """A Block that uses a recurrence instead of attention to combine tokens."""

    columns: ClassVar[bool] = False

    @staticmethod
    def empty_cache(
        config: ModelConfig, lead: tuple[int, ...], batch: int, length: int, dtype: str, kind: str
    ) -> Memory:
        return initial(config, (*lead, batch), dtype)

    @staticmethod
    def keys_per_query(config: ModelConfig, tokens: int, virtual: int) -> float:
        return 0.0

    def mix(self, h: Array, context: Context, cache: Memory | None) -> tuple[Array, Memory | None]:
        return Recurrent(self.config, name="recurrent")(h, context, cache)


def initial(config: ModelConfig, lead: tuple[int, ...], dtype: str) -> Memory:
    """Returns an empty cache for a recurrent layer. Its arrays have extra leading axes of the sizes `lead`."""
    W = config.recurrent
    return Memory(jnp.zeros((*lead, config.conv - 1, W), dtype), jnp.zeros((*lead, W)))


@jax.custom_jvp
def root(x: Array) -> Array:
    """Returns sqrt(x), with a derivative of at most STEEPEST."""
    return jnp.sqrt(x)


@root.defjvp
def _root_slope(x: tuple[Array], dx: tuple[Array]) -> tuple[Array, Array]:
    return jnp.sqrt(x[0]), dx[0] / (2 * jnp.sqrt(jnp.maximum(x[0], (2 * STEEPEST) ** -2)))


def _decays(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Draws the parameter L such that exp(-c * softplus(L)) is uniform in the range DECAYS (section 2.4)."""
    a = jax.random.uniform(key, shape, dtype, *DECAYS)
    return jnp.log(jnp.expm1(-jnp.log(a) / SHARPNESS))
