"""Pretrains a model with the shape of Llama 2 7B, from random weights, on a TPU slice. Mostly used with tools.plan.

    python -m tools.plan --config=configs/pretrain/llama2_7b.py --topology=v5e:4x4
    python -m train.main --config=configs/pretrain/llama2_7b.py --workdir=gs://BUCKET/llama2_7b

Hardware: 16 TPU v5e or 4 TPU v5p chips. Expected: the figures that tools.plan prints; this config has never been
trained. The data source is a placeholder: set data.source and data.tokenizer to your own.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 10_000
    c.model.shape = "llama2-7b"
    c.model.vocab_size = 32000
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.seq_len = 2048
    c.data.batch_size = 64
    c.optim.weight_decay = 0.1
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
