"""The transformer model. Its methods, such as `hidden` and `logits`, are pure functions of a parameter tree.

Only its layers are flax modules.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from common.errors import UserError
from model import weights
from model.config import ModelConfig
from model.net import kv_cache, stack
from model.net.attention import Context, context
from model.net.head import Unembed
from model.net.kinds import KINDS
from model.net.kv_cache import KV, Cache
from model.net.layers import Norm, unembed
from model.weights import Params, Spec, Specs, Tree

# name of JAX's primitive for the forward kernel of cuDNN, whose result has no checkpoint name
CUDNN = "dot_product_attention_fwd_wrapper"

# Remat policies determine which results of a layer are saved for the backward pass. All other results are recomputed.
# "dots" saves the results of `weights.einsum` and, on a TPU or GPU, the result of the attention kernel. Results such as
# softmax and silu are not saved: on a CPU, recomputing them is faster than stacking them in the scan. The policy
# selects results by their checkpoint name, which `weights.einsum` sets. Of LoRA's sum x W + x A B, it therefore saves
# only the sum. A policy that selects every matrix product would save both terms.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("product"),
        lambda primitive, *_, **__: primitive.name == CUDNN,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


REPORTS = ("hidden",)  # "hidden": the residual stream [layers,B,T,D] after each layer


class Hidden(NamedTuple):
    """The result of `Transformer.hidden` for tokens [B,T]."""

    x: Array  # [B,T,D], the input of the head
    cache: Cache | None  # the cache, with the tokens of this call added
    reports: dict[str, Array]  # {name of the requested report: values, stacked over layers}


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A transformer.

    `params["layers"]` is either one tree, whose arrays are stacked over layers, or a tuple with one tree per layer.
    Stacked layers run in a scan. The layers of a tuple run without a scan, which is faster for decoding.
    """

    config: ModelConfig
    dtype: str = "float32"  # the dtype of activations
    param_dtype: str = "float32"
    remat: str = "dots"  # a key of REMAT
    attention: str = "xla"  # attention backend for calls that use no cache; see model/net/backends.py

    # --- parameters ---

    def init(self, key: Array) -> Params:
        """Returns random parameters, stacked over layers.

        To create them sharded, call this in `jax.jit` with `out_shardings`.
        """
        boxes = self._boxes(key)
        return jax.tree.map(lambda s: s.value.astype(self.param_dtype), boxes, is_leaf=weights.is_spec)

    @functools.cached_property
    def specs(self) -> Specs:
        """A tree with the Spec (abstract value, logical axes, equation) of every parameter. Allocates no arrays."""
        boxes = jax.eval_shape(lambda: self._boxes(jax.random.key(0)))

        def cast(spec: Spec) -> Spec:
            return spec.replace(value=jax.ShapeDtypeStruct(spec.shape, self.param_dtype))

        return jax.tree.map(cast, boxes, is_leaf=weights.is_spec)

    @property
    def abstract(self) -> Params:
        """The parameters as ShapeDtypeStructs."""
        return jax.tree.map(lambda s: s.value, self.specs, is_leaf=weights.is_spec)

    def _boxes(self, key: Array) -> Specs:
        c = self.config
        k_embed, k_pos, k_layers, k_head = jax.random.split(key, 4)

        def table(key: Array, shape: tuple[int, int], names: tuple[str, str], eqn: str) -> dict[str, Spec]:
            return {"table": Spec(jax.random.normal(key, shape) * c.embed**-0.5, names, eqn=eqn)}

        layers = self._layer_boxes(k_layers)
        out = {
            "embed": table(k_embed, (c.vocab_size, c.embed), ("vocab", "embed"), "BTV,VD->BTD"),
            "layers": layers,
            "embed_norm" if c.norms == "post" else "final_norm": Norm(c).init(key, jnp.zeros(c.embed))["params"],
        }
        if c.position == "learned":
            out["position"] = table(k_pos, (c.max_len, c.embed), ("position", "embed"), "")
        if c.types:
            k_types = weights.key_for(key, "types")
            out["types"] = table(k_types, (c.types, c.embed), ("types", "embed"), "")
        if not c.tied:
            out["unembed"] = table(k_head, (c.embed, c.vocab_size), ("embed", "vocab"), "BTD,DV->BTV")
        return out

    def _layer_boxes(self, key: Array) -> Specs:
        c = self.config
        x, one = jnp.zeros((1, 1, c.embed)), jnp.ones((1, 1), jnp.int32)
        ctx = context(c, one * 0, one, None, "xla")
        keys = jax.random.split(key, c.layers)

        def of_kind(kind: str) -> Specs:
            block = KINDS[kind](c)
            mine = keys[jnp.asarray(c.stack(f"layers/{kind}"))]
            return jax.vmap(lambda k: block.init(k, x, ctx, None)["params"])(mine)

        layers = stack.join({kind: of_kind(kind) for kind in sorted(set(c.kinds))}, c)
        named = lambda spec: spec.replace(names=("layers", *spec.names))
        return jax.tree.map(named, layers, is_leaf=weights.is_spec)

    # --- forward ---

    def __call__(
        self, params: Params, tokens: Array, positions: Array | None = None, segments: Array | None = None
    ) -> Array:
        """Returns float32 logits [B,T,V] for tokens [B,T]."""
        return self.logits(params, self.hidden(params, tokens, positions, segments).x)

    def hidden(
        self,
        params: Params,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Cache | None = None,
        *,
        types: Array | None = None,
        report: Sequence[str] = (),
    ) -> Hidden:
        """Returns hidden states [B,T,D] for tokens [B,T], the cache with these tokens added, and the requested reports.

        Positions, segments and token types also have shape [B,T]. By default, each row is one document that starts at
        position 0, and all token types are 0. Tokens of segment 0 are padding. Raises UserError for an unknown report.
        """
        c = self.config
        if unknown := set(report) - set(REPORTS):
            raise UserError(f"no layer reports {min(unknown)!r}", "report", f"known: {', '.join(REPORTS)}")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(positions)
        kept = cache is not None
        if virtual := virtual_tokens(params):
            positions = positions + virtual
            if not kept:
                cache = self.cache(*tokens.shape, isinstance(params["layers"], tuple), params)
        rows = weights.take(params["embed"]["table"], tokens, self.dtype)
        x = constrain(self.embedded(params, rows, positions, types))
        ctx = context(c, positions, segments, cache, self.attention, virtual, report)
        x, layers, reports = self._layers(params["layers"], x, ctx, cache and cache.layers)
        if c.norms != "post":
            x = Norm(c).apply({"params": params["final_norm"]}, x)
        if kept:
            cache = Cache(ctx.index + tokens.shape[1], layers, ctx.positions, ctx.segments)
        return Hidden(x, cache if kept else None, reports)

    def embedded(self, params: Params, x: Array, positions: Array, types: Array | None = None) -> Array:
        """Converts token embeddings x [B,T,D] to the input of the first layer."""
        c = self.config
        if c.scale_embed:
            x = x * jnp.bfloat16(c.embed**0.5).astype(x.dtype)  # in Gemma's training, this square root was bfloat16
        if c.position == "learned":
            x = x + weights.take(params["position"]["table"], positions, self.dtype)
        if c.types:
            types = jnp.zeros_like(positions) if types is None else types
            x = x + weights.take(params["types"]["table"], types, self.dtype)
        if c.norms == "post":  # if norms are "post", the input of every layer is normalized
            x = Norm(c).apply({"params": params["embed_norm"]}, x)
        return x

    def layer(
        self, kind: str, x: Array, params: Params, cache: Tree, windowed: bool | Array, ctx: Context
    ) -> tuple[Array, Tree, stack.Reports]:
        """Runs one layer, and returns its output [B,T,D], its new cache and its reports."""
        block, ctx = KINDS[kind](self.config), ctx._replace(windowed=windowed)
        (y, cache), state = block.apply({"params": params}, x, ctx, cache, mutable=["reports"])
        return constrain(y), cache, flatten_dict(state.get("reports", {}), sep="/")

    def _layers(
        self, layers: Params | tuple[Params, ...], x: Array, ctx: Context, caches: Tree
    ) -> tuple[Array, Tree, stack.Reports]:
        one = functools.partial(self.layer, ctx=ctx)
        if isinstance(layers, tuple):
            return stack.unrolled(one, x, layers, caches, self.config)
        if self.remat != "none":
            one = jax.checkpoint(one, policy=REMAT[self.remat], prevent_cse=False, static_argnums=0)
        return stack.scan(one, x, layers, caches, self.config)

    def head(self, params: Params) -> tuple[Unembed, Params]:
        """Returns (function, parameters of the output head).

        The function maps these parameters and hidden states [B,T,D] to float32 logits [B,T,V].
        """
        cap = self.config.logit_cap
        if self.config.tied:
            return functools.partial(unembed, "BTD,VD->BTV", cap), params["embed"]["table"]
        return functools.partial(unembed, "BTD,DV->BTV", cap), params["unembed"]["table"]

    def logits(self, params: Params, x: Array) -> Array:
        """Returns float32 logits [B,T,V] for hidden states [B,T,D]."""
        f, tree = self.head(params)
        return f(tree, x)

    # --- decoding ---

    def cache(
        self, batch: int, length: int, unrolled: bool = True, params: Params | None = None, kind: str = "float"
    ) -> Cache:
        """Returns a cache with room for `length` tokens in each of `batch` rows. `kind` is a key of kv_cache.KINDS.

        If `params` has virtual tokens from prefix or prompt tuning, they are stored in the first columns. Otherwise,
        the cache is empty.
        """
        c = self.config

        def empty(name: str, lead: tuple[int, ...]) -> NamedTuple:
            return KINDS[name].empty_cache(c, lead, batch, length, self.dtype, kind)

        layers: Tree = tuple(empty(name, ()) for name in c.kinds)
        if not unrolled:
            layers = {name: empty(name, (c.kinds.count(name),)) for name in sorted(set(c.kinds))}
            layers = layers if len(layers) > 1 else layers[c.kinds[0]]
        positions = segments = jnp.zeros((batch, length), jnp.int32)
        virtual = virtual_tokens(params or {})
        if virtual:
            layers = _prepended(self._virtual(params), layers, batch, self.dtype, kind)
            first = jnp.broadcast_to(jnp.arange(virtual, dtype=jnp.int32), (batch, virtual))
            positions = jnp.concatenate([first, positions], 1)
            segments = jnp.concatenate([jnp.full_like(first, -1), segments], 1)
        return Cache(jnp.int32(virtual), layers, positions, segments)

    def _virtual(self, params: Params) -> Tree:
        """Returns the keys and values [K,P,H] of virtual tokens for each attention layer, and None for other layers.

        The result has the same structure as `Cache.layers`. Raises UserError for prompt tuning of a bidirectional
        model, because there the prompt's keys depend on the document.
        """
        layers = params["layers"]
        if "prompt" not in params:
            if isinstance(layers, tuple):
                return tuple(map(_prefix, layers))
            others = [name for name in KINDS if name in layers and name != "attn"]
            return {"attn": _prefix(layers), **dict.fromkeys(others)} if others else _prefix(layers)
        if not self.config.causal:
            raise UserError("prompt tuning needs a causal model", "config.peft.name", "use prefix")
        x = params["prompt"].table.astype(self.dtype)[None]
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        x = self.embedded(params, x, positions)
        empty = self.cache(1, x.shape[1], isinstance(layers, tuple))
        ctx = context(self.config, positions, jnp.ones_like(positions), empty, self.attention)
        return self._layers(layers, x, ctx, empty.layers)[1]


def _prefix(layer: Params) -> KV | None:
    """Returns the prefix of a layer or a stack of layers as keys and values, or None for layers without attention."""
    if "attn" not in layer:
        return None
    prefix = layer["attn"]["prefix"]
    return KV(prefix.k.swapaxes(-3, -2), prefix.v.swapaxes(-3, -2))


def _prepended(virtual: Tree, layers: Tree, batch: int, dtype: str, kind: str) -> Tree:
    """Prepends the keys and values [K,P,H] of virtual tokens, the same for every row, to the columns of a cache."""

    def stored(x: Array) -> Array | kv_cache.Coded:
        rows = jnp.tile(x.astype(dtype), (*(1,) * (x.ndim - 3), batch, 1, 1))  # [B*K,P,H]
        return kv_cache.encode(rows, kind)

    def prepend(first: Array | None, rest: Tree) -> Tree:
        if first is None:
            return rest
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], -2), stored(first), rest)

    return jax.tree.map(prepend, virtual, layers, is_leaf=lambda x: x is None)


def virtual_tokens(params: Params) -> int:
    """Returns the number of virtual tokens that prefix or prompt tuning puts before every document."""
    if "prompt" in params:
        return params["prompt"].table.shape[0]
    layers = params.get("layers", {})
    each = layers if isinstance(layers, tuple) else (layers,)
    prefix = next((p["attn"].get("prefix") for p in each if "attn" in p), None)
    return 0 if prefix is None else prefix.k.shape[-3]


def constrain(x: Array) -> Array:
    """Constrains the sharding of activations [B,T,D], with logical axes that only activations use."""
    return nn.with_logical_constraint(x, ("act_batch", "act_seq", "act_embed")[: x.ndim])


def unstack(params: Params, config: ModelConfig) -> Params:
    """Converts the stacked layers of `params` to a tuple with one tree per layer, for decoding without a scan."""
    return {**params, "layers": tuple(stack.pick(params["layers"], config.kinds, i) for i in range(config.layers))}
