"""The decoder as three functions of a parameter tree: `hidden`, `logits`, `init`. Blocks are flax modules."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from model import weights
from model.config import ModelConfig
from model.net import kv_cache
from model.net.layers import Norm, context, softcap
from model.net.recurrent import BLOCKS, block_of, initial, join, pick, scan
from model.weights import Params, Spec, Specs

CUDNN = "dot_product_attention_fwd_wrapper"  # the primitive of its forward kernel, which JAX gives no name to keep

# What the backward pass keeps of a layer. "dots" keeps what `weights.einsum` returns, and on a TPU or GPU what the
# attention kernel does, and recomputes the rest; on a CPU that is faster than keeping everything, since stacking
# residuals in the scan costs more than softmax and silu.
# By name, not by primitive: of a LoRA leaf the sum is kept, and not its two products, each as large as the sum.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("product"),
        lambda primitive, *_, **__: primitive.name == CUDNN,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder-only language model. `params["layers"]` is a stacked tree (scanned) or a tuple of trees (unrolled)."""

    config: ModelConfig
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    remat: str = "dots"
    attention: str = "xla"  # of rows without a cache; see model/net/backends.py

    # --- parameters ---

    def init(self, key: Array) -> Params:
        """Random parameters, stacked. Run it under jit with `out_shardings`."""
        boxes = self._boxes(key)
        return jax.tree.map(lambda s: s.value.astype(self.param_dtype), boxes, is_leaf=weights.is_spec)

    @functools.cached_property
    def specs(self) -> Specs:
        """A Spec (abstract value, logical axes, equation) at every parameter. No array is made."""
        cast = lambda s: s.replace(value=jax.ShapeDtypeStruct(s.shape, self.param_dtype))
        return jax.tree.map(cast, jax.eval_shape(lambda: self._boxes(jax.random.key(0))), is_leaf=weights.is_spec)

    @property
    def abstract(self) -> Params:
        """The parameters as ShapeDtypeStructs."""
        return jax.tree.map(lambda s: s.value, self.specs, is_leaf=weights.is_spec)

    def _boxes(self, key: Array) -> Specs:
        c = self.config
        k_embed, k_pos, k_layers, k_head = jax.random.split(key, 4)
        x = jnp.zeros((1, 1, c.embed))
        one = jnp.ones((1, 1), jnp.int32)
        ctx = context(c, one * 0, one, None, "xla")
        keys = jax.random.split(k_layers, c.layers)
        layer = lambda kind: lambda k: BLOCKS[kind](c).init(k, x, ctx, None, False)["params"]
        of = lambda kind: keys[jnp.asarray(c.stack(f"layers/{kind}"))]
        layers = join({kind: jax.vmap(layer(kind))(of(kind)) for kind in sorted(set(c.kinds))}, c)
        stack = lambda s: s.replace(names=("layers", *s.names))
        table = lambda k, shape, names, eqn: Spec(jax.random.normal(k, shape) * c.embed**-0.5, names, eqn=eqn)
        out = {
            "embed": {"table": table(k_embed, (c.vocab_size, c.embed), ("vocab", "embed"), "BTV,VD->BTD")},
            "layers": jax.tree.map(stack, layers, is_leaf=weights.is_spec),
            "final_norm": Norm(c).init(key, x)["params"],
        }
        if c.position == "learned":
            out["position"] = {"table": table(k_pos, (c.max_len, c.embed), ("position", "embed"), "")}
        if not c.tied:
            head = table(k_head, (c.embed, c.vocab_size), ("embed", "vocab"), "BTD,DV->BTV")
            out["unembed"] = {"table": head}
        return out

    # --- forward ---

    def __call__(self, params: Params, tokens: Array, positions: Any = None, segments: Any = None) -> Array:
        """Logits [B,T,V] in float32 of tokens [B,T]."""
        return self.logits(params, self.hidden(params, tokens, positions, segments)[0])

    def hidden(
        self, params: Params, tokens: Array, positions: Any = None, segments: Any = None, cache: Any = None
    ) -> tuple[Array, Any]:
        """Final hidden states [B,T,D], after the last norm, and the cache with these tokens written to it.

        Without `positions` and `segments` every row is one document that starts at 0.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(positions)
        kept = cache is not None
        if virtual := virtual_tokens(params):
            positions = positions + virtual
            if not kept:
                cache = self.cache(*tokens.shape, isinstance(params["layers"], tuple), params)
        x = constrain(self.embedded(params, weights.take(params["embed"]["table"], tokens, self.dtype), positions))
        ctx = context(c, positions, segments, cache, self.attention, virtual)
        x, kv = self._layers(params["layers"], x, ctx, cache and cache["layers"])
        x = Norm(c).apply({"params": params["final_norm"]}, x)
        if not kept:
            return x, None
        seen = {k: ctx[k] for k in ("positions", "segments")}
        return x, {"layers": kv, "index": ctx["index"] + tokens.shape[1], **seen}

    def embedded(self, params: Params, x: Array, positions: Array) -> Array:
        """Rows of the embedding table [B,T,D] as the first layer sees them."""
        c = self.config
        if c.scale_embed:
            x = x * jnp.bfloat16(c.embed**0.5).astype(x.dtype)  # Gemma was trained with the rounded root
        if c.position == "learned":
            x = x + weights.take(params["position"]["table"], positions, self.dtype)
        return x

    def _layers(self, layers: Any, x: Array, ctx: dict, kv: Any) -> tuple[Array, Any]:
        c = self.config

        def block(x: Array, p: Params, kv: Any, windowed: Any) -> tuple[Array, Any]:
            y, kv = block_of(c, p).apply({"params": p}, x, ctx, kv, windowed)
            return constrain(y), kv

        if isinstance(layers, tuple):  # unrolled: no slice of the stack is copied, which is what decoding needs
            kvs = []
            for i, p in enumerate(layers):
                x, new = block(x, p, kv and kv[i], bool(c.windows and c.windows[i]))
                kvs.append(new)
            return x, kv and tuple(kvs)
        if self.remat != "none":
            block = jax.checkpoint(block, policy=REMAT[self.remat], prevent_cse=False)
        windowed = jnp.asarray([w > 0 for w in c.windows or (0,) * c.layers])
        return scan(block, x, layers, kv, windowed, c)

    def head(self, params: Params) -> tuple[str, Any]:
        """The equation and the table that turn hidden states into logits."""
        if self.config.tied:
            return "BTD,VD->BTV", params["embed"]["table"]
        return "BTD,DV->BTV", params["unembed"]["table"]

    def logits(self, params: Params, x: Array) -> Array:
        """Logits [B,T,V] in float32 of hidden states [B,T,D]."""
        eqn, table = self.head(params)
        return softcap(weights.einsum(eqn, x, table).astype(jnp.float32), self.config.logit_cap)

    # --- decoding ---

    def cache(
        self, batch: int, length: int, unrolled: bool = True, params: Params | None = None, kind: str = "float"
    ) -> dict:
        """A key-value cache for `length` positions of `batch` rows. `segments` 0 marks what is not written.

        `kind`: one of kv_cache.KINDS. Recurrent layers have a state in its place. Stacked, layers of several kinds are
        a dict by kind.

        It is empty unless `params` hold virtual tokens (prefix and prompt tuning): these stand at its start.
        """
        c = self.config
        shape = (batch * c.kv_heads, length, c.head_dim)
        keys = lambda lead: {n: kv_cache.encode(jnp.zeros(lead + shape, self.dtype), kind) for n in ("k", "v")}
        one = lambda block, lead=(): keys(lead) if block == "attn" else initial(c, (*lead, batch), self.dtype)
        if unrolled:
            layers = tuple(map(one, c.kinds))
        else:
            layers = {block: one(block, (c.kinds.count(block),)) for block in set(c.kinds)}
            layers = layers if len(layers) > 1 else layers[c.kinds[0]]
        positions = segments = jnp.zeros((batch, length), jnp.int32)
        virtual = virtual_tokens(params or {})
        if virtual:
            repeat = lambda x: jnp.tile(x.astype(self.dtype), (*(1,) * (x.ndim - 3), batch, 1, 1))  # [B*K,P,H]
            behind = lambda first, rest: jnp.concatenate([first, rest], -2)
            stored = lambda x: kv_cache.encode(repeat(x), kind)
            before = lambda first, rest: rest if first is None else jax.tree.map(behind, stored(first), rest)
            layers = jax.tree.map(before, self._virtual(params), layers, is_leaf=lambda x: x is None)
            first = jnp.broadcast_to(jnp.arange(virtual, dtype=jnp.int32), (batch, virtual))
            positions = jnp.concatenate([first, positions], 1)
            segments = jnp.concatenate([jnp.full_like(first, -1), segments], 1)
        return {"layers": layers, "index": jnp.int32(virtual), "positions": positions, "segments": segments}

    def _virtual(self, params: Params) -> Any:
        """Keys and values [K,P,H] of the virtual tokens, in the shape of a cache's layers; None for recurrent ones."""
        layers = params["layers"]
        if "prompt" not in params:
            one = lambda p: {n: getattr(p["attn"]["prefix"], n).swapaxes(-3, -2) for n in ("k", "v")}
            if isinstance(layers, tuple):
                return tuple(one(p) if "attn" in p else None for p in layers)
            return {"attn": one(layers), "recurrent": None} if "recurrent" in layers else one(layers)
        x = params["prompt"].table.astype(self.dtype)[None]
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        x = self.embedded(params, x, positions)
        empty = self.cache(1, x.shape[1], isinstance(layers, tuple))
        ctx = context(self.config, positions, jnp.ones_like(positions), empty, self.attention)
        return self._layers(layers, x, ctx, empty["layers"])[1]


def virtual_tokens(params: Params) -> int:
    """How many trained tokens stand before every document: those of prefix or prompt tuning."""
    if "prompt" in params:
        return params["prompt"].table.shape[0]
    layers = params.get("layers", {})
    each = layers if isinstance(layers, tuple) else (layers,)
    prefix = next((p["attn"].get("prefix") for p in each if "attn" in p), None)
    return 0 if prefix is None else prefix.k.shape[-3]


def constrain(x: Array) -> Array:
    """Activations [B,T,D] keep their batch on the data axes; a weight's axis of the same letter is another one."""
    return nn.with_logical_constraint(x, ("act_batch", "act_seq", "act_embed")[: x.ndim])


def unstack(params: Params, config: ModelConfig) -> Params:
    """The stacked layers as a tuple of trees, for unrolled decoding."""
    return {**params, "layers": tuple(pick(params["layers"], config.kinds, i) for i in range(config.layers))}
