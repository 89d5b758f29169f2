"""RecurrentGemma: the recurrent and local-attention layers of Griffin, with the norms and embeddings of Gemma."""

from model.config import ModelConfig
from model.families import llama
from model.families._layout import Key

MIXER = llama.LAYER + "temporal_block."
RENAMED = {"self_attn": "temporal_block", "mlp": "mlp_block"}  # {module name in Llama: module name in RecurrentGemma}


def _renamed(key: Key) -> Key:
    parts = key.name.split(".")
    return key._replace(name=".".join(RENAMED.get(part, part) for part in parts))


KEYS = {path: _renamed(key) for path, key in llama.KEYS.items()} | {
    "layers/attn_norm/scale": Key(llama.LAYER + "temporal_pre_norm.weight", "D->D", less=1.0),
    "layers/recurrent/gate": Key(MIXER + "linear_y.weight", "WD->DW"),
    "layers/recurrent/bgate": Key(MIXER + "linear_y.bias", "W->W"),
    "layers/recurrent/in": Key(MIXER + "linear_x.weight", "WD->DW"),
    "layers/recurrent/bin": Key(MIXER + "linear_x.bias", "W->W"),
    "layers/recurrent/out": Key(MIXER + "linear_out.weight", "DW->WD"),
    "layers/recurrent/bout": Key(MIXER + "linear_out.bias", "D->D"),
    "layers/recurrent/conv": Key(MIXER + "conv_1d.weight", "W1C->CW"),
    "layers/recurrent/bconv": Key(MIXER + "conv_1d.bias", "W->W"),
    "layers/recurrent/input": Key(MIXER + "rg_lru.input_gate_weight", "NIJ->NIJ"),
    "layers/recurrent/binput": Key(MIXER + "rg_lru.input_gate_bias", "NJ->NJ"),
    "layers/recurrent/recurrence": Key(MIXER + "rg_lru.recurrent_gate_weight", "NIJ->NIJ"),
    "layers/recurrent/brecurrence": Key(MIXER + "rg_lru.recurrent_gate_bias", "NJ->NJ"),
    "layers/recurrent/decay": Key(MIXER + "rg_lru.recurrent_param", "W->W"),
    "layers/mlp_norm/scale": Key(llama.LAYER + "channel_pre_norm.weight", "D->D", less=1.0),
    "final_norm/scale": Key("model.final_norm.weight", "D->D", less=1.0),
}
FIELDS = {  # {field of ModelConfig: key of config.json}
    "vocab_size": "vocab_size", "layers": "num_hidden_layers", "embed": "hidden_size", "heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings", "conv": "conv1d_width", "logit_cap": "logits_soft_cap",
}  # fmt: skip
DEFAULTS = dict(
    vocab_size=256000, hidden_size=2560, intermediate_size=7680, num_hidden_layers=26, num_attention_heads=10,
    rms_norm_eps=1e-6, tie_word_embeddings=True, conv1d_width=4, logits_soft_cap=30.0,
)  # fmt: skip
NAMES = {"recurrent": "recurrent", "attention": "attn"}


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    embed, heads = hf["hidden_size"], hf["num_attention_heads"]
    theta, scaling = llama.rope(hf)
    llama.refuse(hf, head_dim=embed // heads)
    llama.refuse(scaling, rope_type="default")
    window = hf.get("sliding_window") or hf.get("attention_window_size", 2048)
    return ModelConfig(
        family="recurrent_gemma",
        **llama.read_fields(hf, FIELDS),
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=embed // heads,
        mlp=hf["intermediate_size"] // 2,  # intermediate_size is the sum of the sizes of gate and up
        act=llama.act(hf.get("hidden_activation", "gelu_pytorch_tanh")),
        rotary=llama.rotary(hf, 0.5),
        rope_theta=theta,
        bias="all" if hf.get("attention_bias") else "rest",
        windows=(window,) * hf["num_hidden_layers"],
        blocks=tuple(NAMES[kind] for kind in hf.get("block_types") or ("recurrent", "recurrent", "attention")),
        recurrent=hf.get("lru_width") or embed,
        scale_embed=True,
    )


def hf_config(c: ModelConfig) -> dict:
    return llama.write_fields(c, FIELDS) | {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": 2 * c.mlp,
        "hidden_activation": llama.act_name(c.act),
        "rope_theta": c.rope_theta,
        "partial_rotary_factor": c.rotary,
        "attention_bias": c.bias == "all",
        "attention_window_size": c.windows[0],
        "block_types": [next(theirs for theirs, ours in NAMES.items() if ours == kind) for kind in c.blocks],
        "lru_width": c.recurrent,
    }
