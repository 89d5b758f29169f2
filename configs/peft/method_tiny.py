"""Trains any PEFT method from end to end in seconds, on the task of configs/sft/tiny.py. The base model is frozen.

    python -m train.main --config=configs/peft/method_tiny.py:dora --workdir=runs/dora_tiny

Hardware: a laptop CPU. Expected: the loss falls, but slowly if few parameters are trained or the base model is random.
The part of --config after the colon is the name of a file in model/peft, by default dora. For LoRA-FA (arXiv
2308.03303), use lora with --config.trainable=".*/b". To continue training the adapter of an earlier run or of a PEFT
folder, set --config.peft.name=saved, --config.peft.folder=FOLDER and --config.init=BASE, where BASE is the model that
the adapter was trained on.
"""

from configs.sft import tiny

LEARNING_RATES = {"ia3": 3e-2, "prefix": 3e-2, "prompt": 3e-2}  # methods with few parameters need a high learning rate


def get_config(method="dora"):
    c = tiny.get_config()
    c.peft.name = method or "dora"
    c.optim.lr = LEARNING_RATES.get(c.peft.name, 3e-3)
    return c
