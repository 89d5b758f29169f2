"""GPT-2: learned positions, LayerNorm, biases everywhere; its linear layers are stored [in, out], q, k and v in one."""

from model.config import ModelConfig
from model.families._layout import Key
from model.families.llama import act, act_name, refuse

LAYER = "transformer.h.{}."
KEYS = {
    "embed/table": Key("transformer.wte.weight", "VD->VD"),
    "position/table": Key("transformer.wpe.weight", "PD->PD"),
    "layers/attn_norm/scale": Key(LAYER + "ln_1.weight", "D->D"),
    "layers/attn_norm/bias": Key(LAYER + "ln_1.bias", "D->D"),
    "layers/attn/wq": Key(LAYER + "attn.c_attn.weight", "D(3NH)->DNH", 0),
    "layers/attn/wk": Key(LAYER + "attn.c_attn.weight", "D(3KH)->DKH", 1),
    "layers/attn/wv": Key(LAYER + "attn.c_attn.weight", "D(3KH)->DKH", 2),
    "layers/attn/bq": Key(LAYER + "attn.c_attn.bias", "(3NH)->NH", 0),
    "layers/attn/bk": Key(LAYER + "attn.c_attn.bias", "(3KH)->KH", 1),
    "layers/attn/bv": Key(LAYER + "attn.c_attn.bias", "(3KH)->KH", 2),
    "layers/attn/wo": Key(LAYER + "attn.c_proj.weight", "(NH)D->NHD"),
    "layers/attn/bo": Key(LAYER + "attn.c_proj.bias", "D->D"),
    "layers/mlp_norm/scale": Key(LAYER + "ln_2.weight", "D->D"),
    "layers/mlp_norm/bias": Key(LAYER + "ln_2.bias", "D->D"),
    "layers/mlp/up": Key(LAYER + "mlp.c_fc.weight", "DF->DF"),
    "layers/mlp/bup": Key(LAYER + "mlp.c_fc.bias", "F->F"),
    "layers/mlp/down": Key(LAYER + "mlp.c_proj.weight", "FD->FD"),
    "layers/mlp/bdown": Key(LAYER + "mlp.c_proj.bias", "D->D"),
    "final_norm/scale": Key("transformer.ln_f.weight", "D->D"),
    "final_norm/bias": Key("transformer.ln_f.bias", "D->D"),
    "unembed/table": Key("lm_head.weight", "VD->DV"),
}


DEFAULTS = dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024)
OTHER_NAMES = dict(  # of transformers' attribute map
    hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
    max_position_embeddings="n_positions",
)  # fmt: skip


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | {OTHER_NAMES.get(name, name): value for name, value in hf.items()}
    refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    embed, heads = hf["n_embd"], hf["n_head"]
    return ModelConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        layers=hf["n_layer"],
        embed=embed,
        heads=heads,
        kv_heads=heads,
        head_dim=embed // heads,
        mlp=hf.get("n_inner") or 4 * embed,
        norm="layernorm",
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        act=act(hf.get("activation_function", "gelu_new")),
        gated=False,
        position="learned",
        max_len=hf["n_positions"],
        tied=hf.get("tie_word_embeddings", True),
        bias="all",
    )


def hf_config(c: ModelConfig) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": c.vocab_size,
        "n_layer": c.layers,
        "n_embd": c.embed,
        "n_head": c.heads,
        "n_inner": c.mlp,
        "n_positions": c.max_len,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": act_name(c.act),
        "tie_word_embeddings": c.tied,
    }
