"""The architecture and sizes of a model, as a frozen dataclass. This module must not import jax.

The files in model/families create a ModelConfig from a config.json. The layers of a model read their sizes from it.
"""

import dataclasses
from typing import Any

from common.types import Json

LAYERS = "layers"  # name of the subtree that holds the parameters of all layers, stacked along a layer axis
BIASED = {  # {value of ModelConfig.bias: the projections that have a bias}
    "none": (),
    "qkv": ("qkv",),  # Qwen2
    "attn": ("qkv", "out"),  # Llama and Qwen3, if attention_bias is True
    "mlp": ("mlp",),  # Llama, if mlp_bias is True
    "rest": ("out", "mlp"),  # RecurrentGemma
    "all": ("qkv", "out", "mlp"),  # GPT-2
}
CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "act": ("silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu"),
    "position": ("rope", "learned"),
    "bias": BIASED,
}
SIZE = (1, 2**31 - 1)
RANGES = {  # allowed ranges of a ModelConfig's numeric fields; the range is SIZE for fields that are not listed
    "layers": (1, 4096),
    "norm_eps": (1e-20, 1),
    "rotary": (0, 1),
    "rope_theta": (1.001, 1e15),
    "types": (0, 2**16),
    "recurrent": (0, 2**31 - 1),
    "conv": (1, 2**10),
    "logit_cap": (0, 1e9),
}
POSITIVE = (1e-6, 1e6)
SCALING = (
    {"original_max_position_embeddings": SIZE}
    | dict.fromkeys(  # allowed ranges of the numbers in `rope_scaling`
        ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), POSITIVE
    )
    | dict.fromkeys(("mscale", "mscale_all_dim"), (0, 1e6))
)
STRETCHES = ("linear", "dynamic", "yarn")  # types of `rope_scaling` that extend the context length


def in_layers(path: str) -> bool:
    """Returns whether a parameter, given its name such as "layers/attn/wq", is stacked over layers."""
    return LAYERS in path.split("/")


def number(name: str, value: object, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a number from `low` to `high`. NaN always raises ValueError."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name}={str(value)[:40]} is not a {kind} from {low:g} to {high:g}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture and sizes of a model. The default values are those of Llama.

    A capital letter in the comment of a field stands for this size in einsum equations. `rope_scaling` has the content
    of the `rope_scaling` or `rope_parameters` dict of a Hugging Face config. It is stored as sorted pairs, because a
    ModelConfig must be hashable. `windows` lists the sliding-window size of each layer, where 0 means full attention.
    If `windows` is empty, all layers have full attention. Values may come from untrusted files, so a field that has the
    wrong type or is out of range raises ValueError.
    """

    vocab_size: int  # V
    layers: int  # L
    embed: int  # D
    heads: int  # N
    kv_heads: int  # K; in grouped-query attention, N / K query heads share one key head
    head_dim: int  # H
    mlp: int  # F
    family: str = "llama"  # name of the file in model/families that maps checkpoint tensors to parameters
    norm: str = "rmsnorm"  # or "layernorm"
    norm_eps: float = 1e-5
    norms: str = "pre"  # "pre": x + f(norm(x)), "post": norm(x + f(x)) (BERT), "both": x + norm(f(norm(x))) (Gemma 2)
    act: str = "silu"  # or "gelu", "gelu_tanh", "gelu_sigmoid", "relu"
    gated: bool = True  # if True, the MLP computes act(x @ gate) * (x @ up), as SwiGLU does
    position: str = "rope"  # or "learned"
    rotary: float = 1.0  # fraction of each head's dimensions that rotary embeddings rotate
    max_len: int = 8192
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    tied: bool = False  # if True, the output head uses the transposed embedding table as its matrix
    bias: str = "none"  # a key of BIASED
    qk_norm: bool = False  # if True, each query head and each key head is normalized by an RMSNorm (Qwen3)
    windows: tuple[int, ...] = ()
    causal: bool = True  # if False, a token also attends to later tokens of its document, as in an encoder
    types: int = 0  # U, the number of token types, such as BERT's two segments; each type has an embedding
    blocks: tuple[str, ...] = ("attn",)  # a repeating pattern of layer kinds (see model/net/kinds.py)
    recurrent: int = 0  # W, the width of recurrent layers
    conv: int = 4  # C, the kernel width of the convolution in recurrent layers
    scale_embed: bool = False  # if True, embeddings are multiplied by sqrt(D) (Gemma)
    logit_cap: float = 0.0  # if not 0, logits become cap * tanh(logits / cap)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float):
                number(field.name, value, *RANGES.get(field.name, SIZE), whole=field.type is int)
            elif field.type in (str, bool) and type(value) is not field.type:
                raise ValueError(f"{field.name}={str(value)[:40]!r} is not a {field.type.__name__}")
            elif value not in CHOICES.get(field.name, (value,)):
                raise ValueError(f"{field.name}={value[:40]!r} is not supported")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key heads evenly")
        if self.position == "rope" and int(self.head_dim * self.rotary) % 2:
            rotated = int(self.head_dim * self.rotary)
            raise ValueError(f"rotary embeddings need an even number of dimensions per head, not {rotated}")
        if not all(isinstance(kind, str) for kind in self.blocks):
            raise ValueError("blocks must be names of layer kinds")
        for window in self.windows:
            number("windows", window, 0, SIZE[1], whole=True)
        if len(self.windows) not in (0, self.layers):
            raise ValueError(f"there are {len(self.windows)} windows for {self.layers} layers")
        scaling = dict(self.rope_scaling)
        for name, value in scaling.items():
            for part in value if isinstance(value, tuple) else (value,):
                if name in SCALING or not isinstance(part, str | bool | None):
                    number(f"rope_scaling {name}", part, *SCALING.get(name, (-1e9, 1e9)))
        if scaling.get("low_freq_factor", 1) >= scaling.get("high_freq_factor", 2):
            raise ValueError("rope_scaling high_freq_factor is not above low_freq_factor")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis, keyed by its letter in einsum equations. P is the number of learned positions."""
        sizes = dict(V=self.vocab_size, D=self.embed, F=self.mlp, P=self.max_len)
        sizes |= dict(N=self.heads, K=self.kv_heads, H=self.head_dim)
        if "recurrent" in self.blocks:  # I and J: numbers of inputs and outputs per block of the block-diagonal gates
            block = self.recurrent // self.heads
            sizes |= dict(W=self.recurrent, C=self.conv, I=block, J=block)
        if self.types:
            sizes |= dict(U=self.types)
        return sizes

    @property
    def context(self) -> int:
        """The context length that the model supports: `max_len`, or more if `rope_scaling` extends it."""
        scaling = dict(self.rope_scaling)
        if scaling.get("rope_type", scaling.get("type")) not in STRETCHES:
            return self.max_len
        original = scaling.get("original_max_position_embeddings") or self.max_len
        return max(self.max_len, int(original * scaling.get("factor", 1.0)))

    def biased(self, part: str) -> bool:
        """Returns whether the projections of `part` ("qkv", "out" or "mlp") have a bias."""
        return part in BIASED[self.bias]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer. All kinds are listed in model/net/kinds.py."""
        return (self.blocks * self.layers)[: self.layers]

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether the attention of each layer is limited to a sliding window."""
        return tuple(w > 0 for w in self.windows or (0,) * self.layers)

    def stack(self, path: str) -> list[int]:
        """Returns the indices of the layers that have a parameter such as "layers/attn/wq", in the order in which they
        are stacked.

        For example, only layers of the kind "attn" have parameters in "layers/attn". A parameter whose path does not
        contain the name of a kind exists in every layer.
        """
        parts = path.split("/")
        part = parts[parts.index(LAYERS) + 1]
        return [i for i, kind in enumerate(self.kinds) if part == kind or part not in self.blocks]

    def to_dict(self) -> Json:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: Json) -> "ModelConfig":
        d = dict(d)
        scaling = d.get("rope_scaling") or ()
        pairs = scaling.items() if isinstance(scaling, dict) else scaling
        d["rope_scaling"] = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs))
        d["windows"] = tuple(d.get("windows") or ())
        d["blocks"] = tuple(d.get("blocks") or ("attn",))
        return cls(**d)
