"""Which program computes attention: einsums and a ring of them, or a kernel of the accelerator's vendor.

All of them compute `model.net.attention.attention`. The kernels see a training row by index: inside a segment a later
column is a later position. Decoding with a cache, and rows that do not divide over the mesh, take the einsums.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from model.config import ModelConfig
from model.net.attention import attention
from model.net.ring import FAR, ring_attention
from model.weights import shards

BLOCKS = (1024, 512, 256, 128)  # columns of a tile of splash; 1024 has the fewest compiled cycles on v5e and v6e
ROWS = ("data", "fsdp")


def choose(
    asked: str, config: ModelConfig, dtype: str, seq_len: int, platform: str, context: int = 1
) -> tuple[str, str]:
    """(backend, why) for training rows of `seq_len` that `context` devices split. `asked`: "auto" or a backend.

    Raises UserError when the one asked for cannot run.
    """
    native = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    problem = _problem(native if asked == "auto" else asked, config, dtype, seq_len, platform, context)
    if asked != "auto":
        if problem:
            raise UserError(f"{asked!r} cannot run: {problem}", "config.model.attention", 'let it be "auto"')
        return asked, "as asked"
    return ("xla", f"{native} cannot run: {problem}") if problem else (native, f"the devices are of type {platform}")


def _problem(backend: str, c: ModelConfig, dtype: str, seq_len: int, platform: str, context: int) -> str:
    checks = {
        "xla": (),
        "splash": (
            (platform != "tpu", f"it needs a TPU, the devices are of type {platform}"),
            (c.head_dim % 64, f"the head size {c.head_dim} is not a multiple of 64"),
            (seq_len % (128 * context), f"{seq_len} tokens over {context} devices are not a multiple of 128 each"),
        ),
        "cudnn": (
            (platform != "gpu", f"it needs a GPU, the devices are of type {platform}"),
            (dtype not in ("bfloat16", "float16"), f"activations are {dtype}, it takes bfloat16 or float16"),
            (c.head_dim % 8 or c.head_dim > 128, f"the head size {c.head_dim} is not a multiple of 8 up to 128"),
            (context > 1, "it sees whole rows, and the context axis splits them"),
        ),
    }
    return next((text for wrong, text in checks[backend] if wrong), "")


def attend(q: Array, k: Array, v: Array, context: dict, windowed: Any) -> Array:
    """Attention of q [B,T,N,H] to k, v [B,K,S,H] (see `attention` for a cache) by the `context` of model.net.layers."""
    how, windows = context["attention"], context["windows"]
    (B, T), split = q.shape[:2], shards("context")
    even = T % split == 0 and B % shards(*ROWS) == 0
    if how == "splash" and even and T // split % BLOCKS[-1] == 0:
        masked = lambda window: lambda: splash(q, k, v, context["segments"], window)
        if len(set(windows)) < 2:
            return masked(max(windows, default=0))()
        return jax.lax.cond(windowed, masked(max(windows)), masked(0))
    if how != "cache" and even and split > 1:
        window = jnp.where(windowed, max(windows), FAR) if any(windows) else FAR
        return ring_attention(q, k, v, context["positions"], context["segments"], window)
    see = context["see"]
    if "see_window" in context:
        see = jnp.where(windowed, context["see_window"], see)
    if how == "cudnn":
        whole = lambda x: x.swapaxes(1, 2)
        more = dict(mask=see[:, None], is_causal=True)  # which skips blocks that nothing sees
        return jax.nn.dot_product_attention(q, whole(k), whole(v), **more, implementation="cudnn")
    return attention(q, k, v, see)


def splash(q: Array, k: Array, v: Array, segments: Array, window: int = 0) -> Array:
    """Flash attention by JAX's TPU kernel, forward and backward. q [B,T,N,H]; k, v [B,K,T,H]; segments [B,T].

    The partitioner cannot split a kernel: every device runs its rows and heads. Under a context axis it has its own
    queries and gathers all keys, 2 T K H numbers a row: the kernel streams them, so nothing else grows with T.
    Remat knows what the forward kernel returns as "product", as it does that of `weights.einsum`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    mesh, context, tensor = jax.sharding.get_abstract_mesh(), shards("context"), shards("tensor")
    T, N, H = q.shape[1:]
    shape, block = (T, T), next(b for b in BLOCKS if T // context % b == 0)
    back = min(block, 512)
    local = sa.LocalMask(shape, (window - 1, 0), 0, context) if window else sa.CausalMask(shape, 0, context)
    sizes = sa.BlockSizes(block, block, block, back, back, back, back, back)
    heads = sa.MultiHeadMask([local] * (N // tensor))
    kernel = sa.make_splash_mha(
        heads, block_sizes=sizes, head_shards=1, q_seq_shards=context, residual_checkpoint_name="product"
    )
    q = q.swapaxes(1, 2) * H**-0.5

    def run(kernel: Any, q: Array, k: Array, v: Array, mine: Array, every: Array) -> Array:
        row = lambda q, k, v, mine, every: kernel(q, k, v, segment_ids=sa.SegmentIds(mine, every))
        return jax.vmap(row)(q, k, v, mine, every)

    if mesh.empty:
        return run(kernel, q, k, v, segments, segments).swapaxes(1, 2)
    if k.shape[1] % tensor:  # key heads are repeated until they divide over the axis, as query heads do
        k, v = (jnp.repeat(x, tensor // math.gcd(tensor, k.shape[1]), axis=1) for x in (k, v))
    mask_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "context")))
    queries, keys = P(ROWS, "tensor", "context"), P(ROWS, "tensor")
    specs = (mask_spec, queries, keys, keys, P(ROWS, "context"), P(ROWS))
    run = jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)
    return run(kernel, q, k, v, segments, segments).swapaxes(1, 2)
