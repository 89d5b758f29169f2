"""Named model shapes, used as in `c.model.shape = "tiny"`. Each entry of SHAPES has the keyword arguments of
model.config.ModelConfig."""

from collections.abc import Mapping

from common.types import Leaf


def _llama(vocab_size, layers, embed, heads, kv_heads, mlp, **more):
    more.setdefault("head_dim", embed // heads)
    return dict(vocab_size=vocab_size, layers=layers, embed=embed, heads=heads, kv_heads=kv_heads, mlp=mlp, **more)


def _griffin(*sizes, window, **more):
    layers, embed = sizes[1:3]
    return _llama(
        *sizes, family="recurrent_gemma", norm_eps=1e-6, act="gelu_tanh", bias="rest", rotary=0.5, tied=True,
        windows=(window,) * layers, blocks=("recurrent", "recurrent", "attn"), recurrent=embed, scale_embed=True,
        logit_cap=30.0, **more,
    )  # fmt: skip


SHAPES = {
    "tiny": _llama(512, 2, 64, 4, 2, 128, max_len=512, tied=True),  # tests and dry runs
    "small": _llama(2048, 4, 128, 4, 4, 344, max_len=1024, tied=True),  # trains from scratch in one minute on a laptop
    "smollm2-135m": _llama(49152, 30, 576, 9, 3, 1536, rope_theta=1e5, tied=True),
    "llama2-7b": _llama(32000, 32, 4096, 32, 32, 11008, max_len=4096),
    "llama3-8b": _llama(128256, 32, 4096, 32, 8, 14336, rope_theta=5e5),
    "qwen3-0.6b": _llama(
        151936, 28, 1024, 16, 8, 3072, family="qwen3", head_dim=128, rope_theta=1e6, tied=True,
        qk_norm=True, norm_eps=1e-6, max_len=40960,
    ),
    "tiny-griffin": _griffin(512, 3, 64, 4, 1, 128, window=32),  # two recurrent layers, one attention layer
    "recurrentgemma-2b": _griffin(256000, 26, 2560, 10, 1, 7680, window=2048),
}  # fmt: skip


def resized(name: str, changes: Mapping[str, int]) -> dict[str, Leaf]:
    """Returns a named shape with some sizes changed. If `heads` or `embed` changes, the head size becomes embed /
    heads, and kv_heads is capped at `heads`, unless it is changed as well."""
    shape = {**SHAPES[name], **changes}
    if "heads" in changes or "embed" in changes:
        shape["kv_heads"] = changes.get("kv_heads") or min(shape["kv_heads"], shape["heads"])
        shape["head_dim"] = shape["embed"] // shape["heads"]
    if "windows" in shape:
        shape["windows"] = (shape["windows"] * shape["layers"])[: shape["layers"]]
    return shape
