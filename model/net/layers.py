"""The layers of a transformer, as flax modules. Each weight is declared with the einsum equation that uses it."""

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.config import ModelConfig
from model.net import kv_cache
from model.net.attention import Context, rotate
from model.net.backends import attend
from model.net.kv_cache import KV
from model.weights import AXES, Spec, Tree, Weight

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_sigmoid": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


class Layer(nn.Module):
    """Base class of modules that declare parameters.

    Flax's shape check is skipped when parameters are read, because a parameter may be a `Weight` instead of an array.
    """

    config: ModelConfig

    def weight(self, name: str, eqn: str, scale: float = 1.0) -> Array | Weight:
        """Declares the weight of the einsum `eqn`, and returns its value.

        It is initialized from N(0, scale^2 / fan_in).
        """
        letters = weights.operands(eqn)[1]
        fan_in = math.prod(self.config.sizes[c] for c in weights.split(eqn)[1])
        return self._declare(name, letters, nn.initializers.normal(scale * fan_in**-0.5), eqn)

    def vector(self, name: str, letters: str, init: float) -> Array:
        """Declares a scale or bias, and returns its value. `letters` has one letter for each of its axes.

        All its entries are initialized to `init`.
        """
        return self._declare(name, letters, nn.initializers.constant(init), "")

    def _declare(self, name: str, letters: str, init: nn.initializers.Initializer, eqn: str) -> Array | Weight:
        if not self.is_initializing():
            return self.get_variable("params", name)
        shape = tuple(self.config.sizes[c] for c in letters)
        axes = tuple(AXES[c] for c in letters)
        return self.param(name, lambda key: Spec(init(key, shape, jnp.float32), axes, eqn=eqn))

    def bias(self, name: str, letters: str, x: Array, when: bool) -> Array:
        """If `when` is True, returns x plus a learned bias with the axes `letters`; otherwise, returns x."""
        return x + self.vector(name, letters, 0.0).astype(x.dtype) if when else x


class Norm(Layer):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm over the last axis of x [...,D], computed in float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        h = x.astype(jnp.float32)
        if c.norm == "layernorm":
            h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + c.norm_eps)
        h = h * self.vector("scale", "D", 1.0)
        return self.bias("bias", "D", h, c.norm == "layernorm").astype(x.dtype)


class Attention(Layer):
    """Self-attention, from x [B,T,D] to [B,T,D].

    If there is a cache, tokens also attend to the tokens of earlier calls.
    """

    @nn.compact
    def __call__(self, x: Array, context: Context, cache: KV | None) -> tuple[Array, KV | None]:
        c = self.config
        qkv = c.biased("qkv")
        q = weights.einsum("BTD,DNH->BTNH", x, self.weight("wq", "BTD,DNH->BTNH"))
        k = weights.einsum("BTD,DKH->BTKH", x, self.weight("wk", "BTD,DKH->BTKH"))
        v = weights.einsum("BTD,DKH->BTKH", x, self.weight("wv", "BTD,DKH->BTKH"))
        q, k, v = self.bias("bq", "NH", q, qkv), self.bias("bk", "KH", k, qkv), self.bias("bv", "KH", v, qkv)
        if c.qk_norm:
            q, k = self.head_norm("q_norm", q), self.head_norm("k_norm", k)
        if c.position == "rope":
            q, k = rotate(q, context.angles), rotate(k, context.angles)
        if cache is not None:
            q, k, v = by_heads(q), by_heads(k), by_heads(v)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B,K,S,H]
        if cache is not None:
            cache = KV(kv_cache.write(cache.k, k, context.index), kv_cache.write(cache.v, v, context.index))
            k, v = kv_cache.read(cache.k, q.dtype), kv_cache.read(cache.v, q.dtype)
        y = attend(q, k.astype(q.dtype), v.astype(q.dtype), context)
        y = y if cache is None else by_heads(y)
        scale = (2 * c.layers) ** -0.5  # makes the variance of the residual stream independent of depth, as in GPT-2
        y = weights.einsum("BTNH,NHD->BTD", y, self.weight("wo", "BTNH,NHD->BTD", scale))
        return self.bias("bo", "D", y, c.biased("out")), cache

    def head_norm(self, name: str, x: Array) -> Array:
        """Applies RMSNorm to each attention head of x [B,T,N,H] separately."""
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.config.norm_eps)
        return (h * self.vector(name, "H", 1.0)).astype(x.dtype)


class MLP(Layer):
    """An MLP, from x [B,T,D] to [B,T,D]: SwiGLU (Shazeer 2020, arXiv 2002.05202) or act(x @ up) @ down."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        act, biased = ACTIVATIONS[c.act], c.biased("mlp")
        up = weights.einsum("BTD,DF->BTF", x, self.weight("up", "BTD,DF->BTF"))
        up = self.bias("bup", "F", up, biased)
        if c.gated:
            gate = weights.einsum("BTD,DF->BTF", x, self.weight("gate", "BTD,DF->BTF"))
            h = act(self.bias("bgate", "F", gate, biased)) * up
        else:
            h = act(up)
        down = self.weight("down", "BTF,FD->BTD", (2 * c.layers) ** -0.5)
        return self.bias("bdown", "D", weights.einsum("BTF,FD->BTD", h, down), biased)


class Block(Layer):
    """A layer with two sublayers. The output of each is added to the residual stream x [B,T,D].

    The method `mix` combines different tokens, and the method `feed` transforms each token separately. A call takes x
    and the layer's cache of earlier tokens, or None. It returns the new x, and the cache with the tokens of x added.
    Subclasses implement other kinds of layers. If the attribute `columns` is True, the cache stores a key and a value
    per token. Only such layers support virtual tokens, bidirectional models, and batches whose rows start at different
    decoding steps.
    """

    columns: ClassVar[bool] = True

    @staticmethod
    def empty_cache(
        config: ModelConfig, lead: tuple[int, ...], batch: int, length: int, dtype: str, kind: str
    ) -> NamedTuple:
        """Returns an empty cache. `lead` has the sizes of extra leading axes, and `kind` is a key of kv_cache.KINDS."""
        shape = (*lead, batch * config.kv_heads, length, config.head_dim)
        return KV(*(kv_cache.encode(jnp.zeros(shape, dtype), kind) for _ in KV._fields))

    @staticmethod
    def keys_per_query(config: ModelConfig, tokens: int, virtual: int) -> float:
        """Returns the mean number of keys per query in a row of `virtual` virtual tokens and then `tokens` tokens."""
        return ((tokens + 1) / 2 if config.causal else tokens) + virtual

    @nn.compact
    def __call__(self, x: Array, context: Context, cache: Tree) -> tuple[Array, Tree]:
        h = self.norm_before("attn_norm", x)
        y, cache = self.mix(h, context, cache)
        x = self.norm_behind("attn", x, self.adapted("attn_adapter", h, y))
        h = self.norm_before("mlp_norm", x)
        x = self.norm_behind("mlp", x, self.adapted("mlp_adapter", h, self.feed(h, context)))
        if "hidden" in context.report:
            report(self, "hidden", x)
        return x, cache

    def mix(self, h: Array, context: Context, cache: Tree) -> tuple[Array, Tree]:
        """Runs the sublayer that combines different tokens: attention, unless a subclass overrides this method."""
        return Attention(self.config, name="attn")(h, context, cache)

    def feed(self, h: Array, context: Context) -> Array:
        """Runs the sublayer that transforms each token separately: an MLP, unless a subclass overrides this method."""
        return MLP(self.config, name="mlp")(h)

    def norm_before(self, name: str, x: Array) -> Array:
        """Returns the input of a sublayer: x, after a norm if `config.norms` puts one before sublayers."""
        return x if self.config.norms == "post" else Norm(self.config, name=name)(x)

    def norm_behind(self, name: str, x: Array, y: Array) -> Array:
        """Adds the output y of a sublayer to the residual stream x.

        Normalizes y or the sum if `config.norms` requires it.
        """
        if self.config.norms == "post":
            return Norm(self.config, name=f"{name}_norm")(x + y)
        if self.config.norms == "both":
            y = Norm(self.config, name=f"{name}_out_norm")(y)
        return x + y

    def adapted(self, name: str, x: Array, y: Array) -> Array:
        """Applies the bottleneck adapter `name`, if it exists, to a sublayer with input x and output y."""
        adapter = self.get_variable("params", name)
        return y if adapter is None else adapter(x, y)


def report(module: nn.Module, name: str, value: Array) -> None:
    """Records a value that a layer has computed. `Transformer.hidden` returns it in `reports`."""
    module.sow("reports", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def by_heads(x: Array) -> Array:
    """Shards the heads of activations x [B,T,N,H] like the heads of weights, if the mesh axis "tensor" divides N.

    A cache is not sharded by heads, because it merges batch rows and heads into one axis. Because of this difference,
    XLA's partitioner would gather the weights on every device. With this constraint, it gathers the activations
    instead.
    """
    even = x.shape[2] % weights.shards("tensor") == 0
    return nn.with_logical_constraint(x, ("act_batch", "act_seq", "heads", None)) if even else x


def unembed(eqn: str, cap: float, table: Array | Weight, x: Array) -> Array:
    """Returns float32 logits [B,T,V] for hidden states x [B,T,D], after applying `softcap` with the limit `cap`."""
    return softcap(weights.einsum(eqn, x, table).astype(jnp.float32), cap)


def softcap(logits: Array, cap: float) -> Array:
    """Smoothly limits logits to the range (-cap, cap). If `cap` is 0, returns them unchanged."""
    return cap * jnp.tanh(logits / cap) if cap else logits
