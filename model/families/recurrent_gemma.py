"""RecurrentGemma: Griffin's recurrent layers and layers of local attention, with Gemma's norms, embedding and head."""

from model.config import ModelConfig
from model.families import llama
from model.families._layout import Key

MIXER = llama.LAYER + "temporal_block."
MLP = llama.LAYER + "mlp_block."
KEYS = {
    "embed/table": llama.KEYS["embed/table"],
    "layers/attn_norm/scale": Key(llama.LAYER + "temporal_pre_norm.weight", "D->D", less=1.0),
    "layers/attn/wq": Key(MIXER + "q_proj.weight", "(NH)D->DNH"),
    "layers/attn/wk": Key(MIXER + "k_proj.weight", "(KH)D->DKH"),
    "layers/attn/wv": Key(MIXER + "v_proj.weight", "(KH)D->DKH"),
    "layers/attn/wo": Key(MIXER + "o_proj.weight", "D(NH)->NHD"),
    "layers/attn/bq": Key(MIXER + "q_proj.bias", "(NH)->NH"),
    "layers/attn/bk": Key(MIXER + "k_proj.bias", "(KH)->KH"),
    "layers/attn/bv": Key(MIXER + "v_proj.bias", "(KH)->KH"),
    "layers/attn/bo": Key(MIXER + "o_proj.bias", "D->D"),
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
    "layers/mlp/gate": Key(MLP + "gate_proj.weight", "FD->DF"),
    "layers/mlp/bgate": Key(MLP + "gate_proj.bias", "F->F"),
    "layers/mlp/up": Key(MLP + "up_proj.weight", "FD->DF"),
    "layers/mlp/bup": Key(MLP + "up_proj.bias", "F->F"),
    "layers/mlp/down": Key(MLP + "down_proj.weight", "DF->FD"),
    "layers/mlp/bdown": Key(MLP + "down_proj.bias", "D->D"),
    "final_norm/scale": Key("model.final_norm.weight", "D->D", less=1.0),
    "unembed/table": llama.KEYS["unembed/table"],
}
DEFAULTS = dict(
    vocab_size=256000, hidden_size=2560, intermediate_size=7680, num_hidden_layers=26, num_attention_heads=10
)  # fmt: skip
NAMES = {"recurrent": "recurrent", "attention": "attn"}


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    layers, embed, heads = hf["num_hidden_layers"], hf["hidden_size"], hf["num_attention_heads"]
    theta, scaling = llama.rope(hf)
    llama.refuse(hf)
    llama.refuse(scaling, rope_type="default")
    window = hf.get("sliding_window") or hf.get("attention_window_size", 2048)
    return ModelConfig(
        family="recurrent_gemma",
        vocab_size=hf["vocab_size"],
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=embed // heads,
        mlp=hf["intermediate_size"] // 2,  # of gate and up together
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        act=llama.act(hf.get("hidden_activation", "gelu_pytorch_tanh")),
        rotary=llama.rotary(hf, 0.5),
        rope_theta=theta,
        tied=hf.get("tie_word_embeddings", True),
        bias="all" if hf.get("attention_bias") else "rest",
        windows=(window,) * layers,
        blocks=tuple(NAMES[kind] for kind in hf.get("block_types") or ("recurrent", "recurrent", "attention")),
        recurrent=hf.get("lru_width") or embed,
        conv=hf.get("conv1d_width", 4),
        scale_embed=True,
        logit_cap=hf.get("logits_soft_cap", 30.0),
    )


def hf_config(c: ModelConfig) -> dict:
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": c.vocab_size,
        "num_hidden_layers": c.layers,
        "hidden_size": c.embed,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": 2 * c.mlp,
        "rms_norm_eps": c.norm_eps,
        "hidden_activation": llama.act_name(c.act),
        "rope_theta": c.rope_theta,
        "partial_rotary_factor": c.rotary,
        "tie_word_embeddings": c.tied,
        "attention_bias": c.bias == "all",
        "attention_window_size": c.windows[0],
        "block_types": [next(theirs for theirs, ours in NAMES.items() if ours == kind) for kind in c.blocks],
        "lru_width": c.recurrent,
        "conv1d_width": c.conv,
        "logits_soft_cap": c.logit_cap,
    }
