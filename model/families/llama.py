"""Llama 2, Llama 3 and SmolLM2. The modules of related model families define only their differences from Llama."""

from typing import Any

from common.errors import UserError
from model.config import ModelConfig
from model.families._layout import Key

ARCHITECTURE = "LlamaForCausalLM"
LAYER = "model.layers.{}."
KEYS = {
    "embed/table": Key("model.embed_tokens.weight", "VD->VD"),
    "layers/attn_norm/scale": Key(LAYER + "input_layernorm.weight", "D->D"),
    "layers/attn/wq": Key(LAYER + "self_attn.q_proj.weight", "(NH)D->DNH"),
    "layers/attn/wk": Key(LAYER + "self_attn.k_proj.weight", "(KH)D->DKH"),
    "layers/attn/wv": Key(LAYER + "self_attn.v_proj.weight", "(KH)D->DKH"),
    "layers/attn/wo": Key(LAYER + "self_attn.o_proj.weight", "D(NH)->NHD"),
    "layers/attn/bq": Key(LAYER + "self_attn.q_proj.bias", "(NH)->NH"),
    "layers/attn/bk": Key(LAYER + "self_attn.k_proj.bias", "(KH)->KH"),
    "layers/attn/bv": Key(LAYER + "self_attn.v_proj.bias", "(KH)->KH"),
    "layers/attn/bo": Key(LAYER + "self_attn.o_proj.bias", "D->D"),
    "layers/mlp_norm/scale": Key(LAYER + "post_attention_layernorm.weight", "D->D"),
    "layers/mlp/gate": Key(LAYER + "mlp.gate_proj.weight", "FD->DF"),
    "layers/mlp/up": Key(LAYER + "mlp.up_proj.weight", "FD->DF"),
    "layers/mlp/down": Key(LAYER + "mlp.down_proj.weight", "DF->FD"),
    "layers/mlp/bgate": Key(LAYER + "mlp.gate_proj.bias", "F->F"),
    "layers/mlp/bup": Key(LAYER + "mlp.up_proj.bias", "F->F"),
    "layers/mlp/bdown": Key(LAYER + "mlp.down_proj.bias", "D->D"),
    "final_norm/scale": Key("model.norm.weight", "D->D"),
    "unembed/table": Key("lm_head.weight", "VD->DV"),
}
FIELDS = {  # {field of ModelConfig: key of config.json}
    "vocab_size": "vocab_size", "layers": "num_hidden_layers", "embed": "hidden_size", "heads": "num_attention_heads",
    "mlp": "intermediate_size", "norm_eps": "rms_norm_eps", "max_len": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}  # fmt: skip
DEFAULTS = dict(  # values for keys that are missing in a config.json; transformers uses the same values
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
ACTS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "quick_gelu": "gelu_sigmoid", "relu": "relu",
}  # fmt: skip
ROPES = {  # {rope type: numbers that rope_scaling must have for this type}
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
ROPE_FIELDS = {  # all known fields of rope_scaling, of any rope type
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
    "truncate", "mrope_section", "mrope_interleaved", "finetuned",
}  # fmt: skip
BIASES = {(False, False): "none", (True, False): "attn", (False, True): "mlp", (True, True): "all"}  # attention, MLP


def config(hf: dict, defaults: dict | None = None, **delta: Any) -> ModelConfig:
    """Converts a config.json to a ModelConfig. Raises UserError for a model that is not supported.

    A related model family passes its own `defaults`, and passes the ModelConfig fields that differ from Llama as
    `delta`.
    """
    hf = DEFAULTS | (defaults or {}) | hf
    refuse(hf)
    theta, scaling = rope(hf)
    if rotary(hf) != 1.0:
        raise UserError("rotary embeddings on only a part of the head are not supported", "partial_rotary_factor")
    fields = read_fields(hf, FIELDS) | dict(
        family="llama",
        kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        act=act(hf.get("hidden_act", "silu")),
        rope_theta=theta,
        rope_scaling=scaling,
        bias=BIASES[bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))],
    )
    return ModelConfig.from_dict(fields | delta)


def hf_config(c: ModelConfig) -> dict:
    """Returns the config.json of a model, using only keys that every version of transformers reads."""
    return write_fields(c, FIELDS) | {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": act_name(c.act),
        "rope_theta": c.rope_theta,
        "rope_scaling": dict(c.rope_scaling) or None,
        "attention_bias": c.bias in ("attn", "all"),
        "mlp_bias": c.bias in ("mlp", "all"),
    }


def read_fields(hf: dict, fields: dict[str, str]) -> dict[str, Any]:
    """Reads arguments of ModelConfig from a config.json. `fields` is {field of ModelConfig: key in config.json}."""
    return {ours: hf[theirs] for ours, theirs in fields.items()}


def write_fields(c: ModelConfig, fields: dict[str, str]) -> dict[str, Any]:
    """The inverse of `read_fields`."""
    return {theirs: getattr(c, ours) for ours, theirs in fields.items()}


def rope(hf: dict) -> tuple[float, dict]:
    """Returns (theta, scaling parameters) from a config.json. The scaling parameters are {} if there is no scaling.

    Raises UserError for a type of scaling that is not supported.
    """
    scaling = dict(spelled(hf))
    if any(isinstance(v, dict) for v in scaling.values()):
        raise UserError("rope parameters that differ between layers are not supported", "rope_parameters")
    beside = hf.get("rope_theta")
    theta = scaling.pop("rope_theta", None) or beside or 10000.0
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    for name in ("type", "partial_rotary_factor", "mrope_section", "mrope_interleaved"):
        scaling.pop(name, None)
    original = "original_max_position_embeddings"
    length, before = hf.get("max_position_embeddings"), hf.get(original)
    kind = "default" if kind == "mrope" else kind  # mrope has three positions per token, which are equal for text
    if kind not in ROPES:
        raise UserError(f"rope type {kind!r} is not supported; supported: {', '.join(ROPES)}", "rope_scaling")
    if kind == "default":
        return float(theta), {}
    scaling = {k: v for k, v in scaling.items() if v is not None}
    if kind in ("llama3", "yarn") and before:
        scaling[original] = before
    if kind == "llama3":
        scaling.setdefault(original, length)
    if kind == "yarn" and isinstance(scaling.get(original), int):
        scaling.setdefault("factor", length / scaling[original])
    if missing := [k for k in ROPES[kind] if not isinstance(scaling.get(k), int | float)]:
        raise UserError(f"rope type {kind} needs a number for {missing[0]}", "rope_scaling")
    return float(theta), {"rope_type": kind, **scaling}


def spelled(hf: dict) -> dict:
    """Returns the rope parameters of a config.json: `rope_scaling`, or `rope_parameters` as in transformers 5."""
    older, newer = hf.get("rope_scaling"), hf.get("rope_parameters")
    return older or newer or {}


def rotary(hf: dict, default: float = 1.0) -> float:
    """Returns the fraction of each head's dimensions that rotary embeddings rotate."""
    beside = hf.get("partial_rotary_factor")
    return spelled(hf).get("partial_rotary_factor") or beside or default


def act(name: str) -> str:
    if name not in ACTS:
        raise UserError(f"activation {name!r} is not supported; supported: {', '.join(ACTS)}", "hidden_act")
    return ACTS[name]


def act_name(ours: str) -> str:
    return next(theirs for theirs, name in ACTS.items() if name == ours)


def refuse(hf: dict, **expected: Any) -> None:
    """Raises UserError if a config.json makes the model bidirectional or has values that differ from `expected`."""
    for key, value in {"is_causal": True, "use_bidirectional_attention": False, **expected}.items():
        if hf.get(key, value) not in (value, None):
            raise UserError(f"{key}={hf[key]!r} is not supported; only {value!r} is", hf.get("model_type", ""))


def windows(hf: dict) -> tuple[int, ...]:
    """Returns the sliding-window size of each layer of a Qwen model, where 0 means full attention.

    In the config.json, `layer_types` or, if it is missing, `max_window_layers` determines which layers have a window.
    """
    layers, window = hf.get("num_hidden_layers", 32), hf.get("sliding_window", 4096)
    first, types = hf.get("max_window_layers", 28), hf.get("layer_types")
    if not hf.get("use_sliding_window") or not window:
        return ()
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    sliding = [kind == "sliding_attention" for kind in types or default]
    return tuple(window * s for s in sliding) if any(sliding) else ()


def window_config(c: ModelConfig) -> dict:
    """The inverse of `windows`."""
    types = ["sliding_attention" if w else "full_attention" for w in c.windows or (0,) * c.layers]
    window = max(c.windows, default=0) or None
    return {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": types}
