"""Shapes by name: `c.model.shape = "tiny"`. Each entry is keyword arguments of model.config.ModelConfig."""


def _llama(vocab_size, layers, embed, heads, kv_heads, mlp, **more):
    more.setdefault("head_dim", embed // heads)
    return dict(vocab_size=vocab_size, layers=layers, embed=embed, heads=heads, kv_heads=kv_heads, mlp=mlp, **more)


SHAPES = {
    "tiny": _llama(512, 2, 64, 4, 2, 128, max_len=512, tied=True),  # tests and dry runs
    "small": _llama(2048, 4, 128, 4, 4, 344, max_len=1024, tied=True),  # one minute from scratch on a laptop
    "smollm2-135m": _llama(49152, 30, 576, 9, 3, 1536, rope_theta=1e5, tied=True),
    "llama2-7b": _llama(32000, 32, 4096, 32, 32, 11008, max_len=4096),
    "llama3-8b": _llama(128256, 32, 4096, 32, 8, 14336, rope_theta=5e5),
    "qwen3-0.6b": _llama(
        151936, 28, 1024, 16, 8, 3072, family="qwen3", head_dim=128, rope_theta=1e6, tied=True,
        qk_norm=True, norm_eps=1e-6, max_len=40960,
    ),
}  # fmt: skip
