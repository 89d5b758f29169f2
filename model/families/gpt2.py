"""GPT-2, with learned positions, LayerNorms, and biases in all projections.

GPT-2 checkpoints store matrices as [inputs, outputs]. One matrix contains the weights for queries, keys and values.
"""

from model.config import ModelConfig
from model.families._layout import Key
from model.families.llama import act, act_name, read_fields, refuse, write_fields

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

FIELDS = {  # {field of ModelConfig: key of config.json}
    "vocab_size": "vocab_size", "layers": "n_layer", "embed": "n_embd", "heads": "n_head", "max_len": "n_positions",
    "norm_eps": "layer_norm_epsilon", "tied": "tie_word_embeddings",
}  # fmt: skip
DEFAULTS = dict(
    vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024, layer_norm_epsilon=1e-5,
    tie_word_embeddings=True,
)  # fmt: skip
OTHER_NAMES = dict(  # other names of these keys, from `attribute_map` in transformers
    hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
    max_position_embeddings="n_positions",
)  # fmt: skip


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf | {ours: value for name, ours in OTHER_NAMES.items() if (value := hf.get(name)) is not None}
    refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return ModelConfig(
        family="gpt2",
        **read_fields(hf, FIELDS),
        kv_heads=hf["n_head"],
        head_dim=hf["n_embd"] // hf["n_head"],
        mlp=hf.get("n_inner") or 4 * hf["n_embd"],
        norm="layernorm",
        act=act(hf.get("activation_function", "gelu_new")),
        gated=False,
        position="learned",
        bias="all",
    )


def hf_config(c: ModelConfig) -> dict:
    own = {"n_inner": c.mlp, "activation_function": act_name(c.act)}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **write_fields(c, FIELDS), **own}
