"""BERT: a bidirectional encoder with learned positions, token types, and a LayerNorm after every residual addition."""

from model.config import ModelConfig
from model.families._layout import Key
from model.families.llama import act, act_name, read_fields, refuse, write_fields

LAYER = "bert.encoder.layer.{}."
KEYS = {
    "embed/table": Key("bert.embeddings.word_embeddings.weight", "VD->VD"),
    "position/table": Key("bert.embeddings.position_embeddings.weight", "PD->PD"),
    "types/table": Key("bert.embeddings.token_type_embeddings.weight", "UD->UD"),
    "embed_norm/scale": Key("bert.embeddings.LayerNorm.weight", "D->D"),
    "embed_norm/bias": Key("bert.embeddings.LayerNorm.bias", "D->D"),
    "layers/attn/wq": Key(LAYER + "attention.self.query.weight", "(NH)D->DNH"),
    "layers/attn/wk": Key(LAYER + "attention.self.key.weight", "(KH)D->DKH"),
    "layers/attn/wv": Key(LAYER + "attention.self.value.weight", "(KH)D->DKH"),
    "layers/attn/bq": Key(LAYER + "attention.self.query.bias", "(NH)->NH"),
    "layers/attn/bk": Key(LAYER + "attention.self.key.bias", "(KH)->KH"),
    "layers/attn/bv": Key(LAYER + "attention.self.value.bias", "(KH)->KH"),
    "layers/attn/wo": Key(LAYER + "attention.output.dense.weight", "D(NH)->NHD"),
    "layers/attn/bo": Key(LAYER + "attention.output.dense.bias", "D->D"),
    "layers/attn_norm/scale": Key(LAYER + "attention.output.LayerNorm.weight", "D->D"),
    "layers/attn_norm/bias": Key(LAYER + "attention.output.LayerNorm.bias", "D->D"),
    "layers/mlp/up": Key(LAYER + "intermediate.dense.weight", "FD->DF"),
    "layers/mlp/bup": Key(LAYER + "intermediate.dense.bias", "F->F"),
    "layers/mlp/down": Key(LAYER + "output.dense.weight", "DF->FD"),
    "layers/mlp/bdown": Key(LAYER + "output.dense.bias", "D->D"),
    "layers/mlp_norm/scale": Key(LAYER + "output.LayerNorm.weight", "D->D"),
    "layers/mlp_norm/bias": Key(LAYER + "output.LayerNorm.bias", "D->D"),
    "unembed/table": Key("lm_head.weight", "VD->DV"),  # not in checkpoints, because the head is tied to the embedding
}
FIELDS = {  # {field of ModelConfig: key of config.json}
    "vocab_size": "vocab_size", "layers": "num_hidden_layers", "embed": "hidden_size", "heads": "num_attention_heads",
    "mlp": "intermediate_size", "max_len": "max_position_embeddings", "types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}  # fmt: skip
DEFAULTS = dict(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12, hidden_act="gelu",
)  # fmt: skip


def config(hf: dict) -> ModelConfig:
    hf = DEFAULTS | hf
    refuse(hf, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return ModelConfig(
        family="bert",
        **read_fields(hf, FIELDS),
        kv_heads=hf["num_attention_heads"],
        head_dim=hf["hidden_size"] // hf["num_attention_heads"],
        norm="layernorm",
        norms="post",
        act=act(hf["hidden_act"]),
        gated=False,
        position="learned",
        tied=True,
        bias="all",
        causal=False,
    )


def hf_config(c: ModelConfig) -> dict:
    own = {"architectures": ["BertModel"], "model_type": "bert", "hidden_act": act_name(c.act)}
    return own | {"position_embedding_type": "absolute"} | write_fields(c, FIELDS)
