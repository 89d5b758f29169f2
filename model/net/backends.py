"""Chooses how attention is computed: with einsums, with ring attention, or with the accelerator vendor's kernel.

All backends compute the same function as `model.net.attention.attention`. The vendors' kernels apply causal masks and
windows according to the order of tokens in a row, not according to their positions. So positions must increase within
each document, as they do in training rows. Einsums are used for decoding with a cache, and for batches that cannot be
divided evenly over the mesh.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common.errors import UserError
from model.config import ModelConfig
from model.net.attention import Context, attention
from model.net.ring import FAR, ring_attention
from model.weights import shards

BLOCKS = (1024, 512, 256, 128)  # tokens per tile of the splash kernel; 1024 is fastest on TPU v5e and v6e
ROWS = ("data", "fsdp")


def choose(asked: str, config: ModelConfig, dtype: str, seq_len: int, platform: str, split: int = 1) -> tuple[str, str]:
    """Returns (backend, reason for choosing it) for training rows of `seq_len` tokens, each split over `split` devices.

    `asked` is the backend that the config requests, or "auto". Raises UserError if the requested backend cannot run.
    """
    native = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    problem = _problem(native if asked == "auto" else asked, config, dtype, seq_len, platform, split)
    if asked != "auto":
        if problem:
            raise UserError(f"{asked!r} cannot run: {problem}", "config.model.attention", 'set it to "auto"')
        return asked, "as configured"
    return ("xla", f"{native} cannot run: {problem}") if problem else (native, f"the devices are of type {platform}")


def _problem(backend: str, c: ModelConfig, dtype: str, seq_len: int, platform: str, split: int) -> str:
    checks = {
        "xla": (),
        "splash": (
            (platform != "tpu", f"it needs a TPU, but the devices are of type {platform}"),
            (not c.causal and split > 1, "it cannot split the rows of a bidirectional model over devices"),
            (c.head_dim % 64, f"the head size {c.head_dim} is not a multiple of 64"),
            (seq_len % (128 * split), f"{seq_len} tokens / {split} devices is not a multiple of 128"),
        ),
        "cudnn": (
            (platform != "gpu", f"it needs a GPU, but the devices are of type {platform}"),
            (dtype not in ("bfloat16", "float16"), f"activations are {dtype}, but must be bfloat16 or float16"),
            (c.head_dim % 8 or c.head_dim > 128, f"head size {c.head_dim} is not a multiple of 8 or exceeds 128"),
            (split > 1, "it needs whole rows, but the mesh axis context splits them"),
        ),
    }
    return next((text for wrong, text in checks[backend] if wrong), "")


def attend(q: Array, k: Array, v: Array, context: Context) -> Array:
    """Computes attention [B,T,N,H] for queries q [B,T,N,H], k and v [B,K,S,H], with the backend `context.backend`.

    If k and v come from a cache, they have shape [B*K,S,H].
    """
    how, window = context.backend, max(context.windows, default=0)
    (B, T), split = q.shape[:2], shards("context")
    even = T % split == 0 and B % shards(*ROWS) == 0
    if how == "splash" and even and T // split % BLOCKS[-1] == 0 and (context.causal or split == 1):
        return _splash_of_layer(q, k, v, context, window)
    if how != "cache" and even and split > 1:
        far = jnp.where(context.windowed, window, FAR) if window else FAR
        return ring_attention(q, k, v, context.positions, context.segments, far, context.causal)
    see = context.see
    if context.see_window is not None:
        see = jnp.where(context.windowed, context.see_window, see)
    if how == "cudnn":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        # If is_causal, the kernel skips blocks of keys that are completely masked.
        return jax.nn.dot_product_attention(
            q, k, v, mask=see[:, None], is_causal=context.causal, implementation="cudnn"
        )
    return attention(q, k, v, see)


def _splash_of_layer(q: Array, k: Array, v: Array, context: Context, window: int) -> Array:
    """Runs `splash` with the window of the current layer.

    If only some layers have a window, `jax.lax.cond` chooses between a kernel with a window and a kernel without one.
    """

    def seeing(window: int) -> Callable[[], Array]:
        return lambda: splash(q, k, v, context.segments, window, context.causal)

    if len(set(context.windows)) < 2:
        return seeing(window)()
    return jax.lax.cond(context.windowed, seeing(window), seeing(0))


def splash(q: Array, k: Array, v: Array, segments: Array, window: int = 0, causal: bool = True) -> Array:
    """Computes flash attention for q [B,T,N,H], k and v [B,K,T,H] with JAX's splash-attention kernel for TPUs.

    XLA's partitioner cannot split a kernel, so each device runs the kernel on its own rows and heads. If the mesh axis
    "context" shards sequences, each device keeps its own queries, and gathers all keys and values, which are 2 T K H
    numbers per row. The kernel reads keys and values block by block, and never stores a T x T array. The result of the
    forward kernel has the checkpoint name "product", like the results of `weights.einsum`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    mesh, split, tensor = jax.sharding.get_abstract_mesh(), shards("context"), shards("tensor")
    T, N, H = q.shape[1:]
    shape, block = (T, T), next(b for b in BLOCKS if T // split % b == 0)
    back = min(block, 512)
    if window:
        local = sa.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0, split)
    else:
        local = sa.CausalMask(shape, 0, split) if causal else sa.FullMask(shape)
    sizes = sa.BlockSizes(block, block, block, back, back, back, back, back)
    heads = sa.MultiHeadMask([local] * (N // tensor))
    kernel = sa.make_splash_mha(
        heads, block_sizes=sizes, head_shards=1, q_seq_shards=split, residual_checkpoint_name="product"
    )
    q = q.swapaxes(1, 2) * H**-0.5

    def run(kernel: Callable[..., Array], q: Array, k: Array, v: Array, mine: Array, every: Array) -> Array:
        def row(q: Array, k: Array, v: Array, mine: Array, every: Array) -> Array:
            return kernel(q, k, v, segment_ids=sa.SegmentIds(mine, every))

        return jax.vmap(row)(q, k, v, mine, every)

    if mesh.empty:
        return run(kernel, q, k, v, segments, segments).swapaxes(1, 2)
    if k.shape[1] % tensor:  # repeat key heads so that the size of the mesh axis "tensor" divides their number
        k, v = (jnp.repeat(x, tensor // math.gcd(tensor, k.shape[1]), axis=1) for x in (k, v))
    mask_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, "context")))
    queries, keys = P(ROWS, "tensor", "context"), P(ROWS, "tensor")
    specs = (mask_spec, queries, keys, keys, P(ROWS, "context"), P(ROWS))
    run = jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)
    return run(kernel, q, k, v, segments, segments).swapaxes(1, 2)
