"""Trains any PEFT method from end to end in seconds, on the task of configs/sft/tiny.py with a frozen base model.

    python -m train.main --config=configs/peft/method_tiny.py:dora --workdir=runs/dora_tiny

Hardware: a laptop CPU. Expected: the loss falls, but slowly if few parameters are trained or the base model is random.
The argument is the name of a file in model/peft, by default dora. LoRA-FA (arXiv 2308.03303) is the method lora with
--config.trainable=".*/b". To continue training the adapter of an earlier run or of a PEFT folder, set
--config.peft.name=saved, --config.peft.folder=FOLDER and --config.init=BASE, where BASE is the model on which the
adapter was trained.
"""

from configs.sft import tiny

LEARNING_RATES = {"ia3": 3e-2, "prefix": 3e-2, "prompt": 3e-2}  # few parameters need large steps


def get_config(method="dora"):
    c = tiny.get_config()
    c.peft.name = method or "dora"
    c.optim.lr = LEARNING_RATES.get(c.peft.name, 3e-3)
    return c
