"""Fine-tunes an embedding model on questions and their answer passages; other passages in the batch are negatives.

    python -m train.main --config=configs/embed/own_documents.py:file=pairs.jsonl --workdir=runs/embedder

The file has the columns query and passage. If its columns have other names, rename them with --config.data.fields. If
training lowers the mean reciprocal rank (MRR) on held-out questions, the run stops with exit code 71. Add
--config.peft.name=lora --config.optim.lr=1e-3 to train LoRA instead of all weights.

Hardware: a laptop CPU; 3 seconds per step. Expected: the MRR on held-out questions rises. To measure whether search has
improved, run `tools.index --questions`.
"""

from configs import base
from configs.schema.overrides import parse_arg


def get_config(arg=""):
    arg = parse_arg(arg, file="pairs.jsonl")
    c = base.get_config()
    c.init = "all-minilm-l6-v2"
    c.epochs = 1.0
    c.objective.name = "contrastive"
    c.objective.query_tokens = 32
    c.data.source = arg.file
    c.data.format = "match"
    c.data.holdout = 0.1
    c.data.seq_len = 128
    c.data.batch_size = 32
    c.data.packing = "none"
    c.optim.lr = 5e-5
    c.optim.warmup = 0.1
    c.log_every = 5
    c.eval_every = 50
    c.eval_batches = 8
    c.floors = (("eval/mrr", "drop", 0.0),)
    c.ckpt.every = 50
    return c
