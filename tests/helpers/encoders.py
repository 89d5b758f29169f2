"""A tiny encoder as sentence-transformers saves one."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Core
from tokenizers import models, pre_tokenizers, processors

from model.families import bert
from model.io.export import tensors
from tests.helpers.models import random_model

BERT = bert.config(
    dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
         max_position_embeddings=12)
)  # fmt: skip
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "rain", "in", "spain", "query", ":"]


def encoder(path: Path) -> Path:
    """A folder with a tiny BERT of random weights, its tokenizer, and the files of sentence-transformers."""
    model, params = random_model(BERT)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors(model, params)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(bert.hf_config(BERT)))
    core = Core(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.add_special_tokens(WORDS[:4])
    core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    core.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}))
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query: "}}))
    return path
