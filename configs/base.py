"""All config keys, with their defaults and meanings. A config file starts from these defaults and changes some keys.

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
    """Returns the default. The arguments list every value that the key takes, and configs/schema/keys.py reads this
    list."""
    return default


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # random seed of the initial weights, the order of the data, and dropout
    c.steps = 1000  # optimizer steps
    c.epochs = 0.0  # passes over the rows of all sources; a value above 0 determines `steps` after the data is read
    c.accum = 1  # micro-batches per step (gradient accumulation); more of them save memory and give the same result
    c.init = ""  # initial weights: a model or run folder, .gguf file, packaged model or hub id; "": random weights
    c.trainable = "all"  # trained parameters: "all" (with peft: the adapters), "adapters" or a regex on parameter paths
    c.allow = ()  # kinds of changes that a resumed run accepts although they alter its result: "data", "config"

    c.model = ConfigDict()
    c.model.shape = ""  # name of a model shape in configs/models.py; "": the shape of the model in `init`
    c.model.layers = placeholder(int)  # overrides the number of layers of `model.shape`
    c.model.embed = placeholder(int)  # overrides the model width D of `model.shape`; the head size is embed / heads
    c.model.heads = placeholder(int)  # overrides the number N of query heads of `model.shape`
    c.model.kv_heads = placeholder(int)  # overrides the number K of key and value heads; must divide `model.heads`
    c.model.mlp = placeholder(int)  # overrides the hidden width F of the MLP
    c.model.vocab_size = placeholder(int)  # vocabulary size; if unset, the tokenizer's rounded up to a multiple of 64
    c.model.dtype = one_of("float32", "bfloat16", "float16")  # data type of activations
    c.model.param_dtype = one_of("float32", "bfloat16", "float16")  # data type of weights; 16 bits: stochastic rounding
    c.model.remat = one_of("dots", "none", "full")  # recompute all activations (full) or all but matrix products (dots)
    c.model.attention = one_of("auto", "xla", "splash", "cudnn")  # attention kernel; splash needs a TPU, cudnn a GPU

    c.objective = ConfigDict({"name": "sft"})  # training objective: file in train/objectives and its keyword arguments
    c.peft = ConfigDict({"name": ""})  # PEFT method: file in model/peft and its keyword arguments; "": none
    c.quant = ConfigDict({"name": ""})  # quantizer: file in model/quant and its keyword arguments; "": none

    c.data = ConfigDict()
    c.data.source = "pydocs"  # training data (see data/sources.py); "pydocs:0.7,sotu:0.3" mixes two sources
    c.data.eval_source = ""  # held-out data; "": the validation split of `source`, or else the fraction `holdout`
    c.data.holdout = 0.05  # fraction of the documents that is excluded from training to measure the held-out loss
    c.data.format = "auto"  # record format: one of FORMATS in data/formats.py, or "auto" to detect it from the columns
    c.data.fields = ""  # columns to rename, as NEW=OLD: "prompt=question,completion=answer"
    c.data.tokenizer = ""  # tokenizer (see data/text/tokenizer.py); "": the tokenizer of `init`, or else bytes
    c.data.chat_template = ""  # template file, name in data/text/templates, "none" (raw prompts) or "" (the model's)
    c.data.read_control = False  # parse control tokens in the text of the data, for chats that are already rendered
    c.data.learn = "all"  # which answers of a chat count in the loss: "all" or "last"
    c.data.seq_len = 256  # tokens per row (T)
    c.data.batch_size = 8  # rows per step over all hosts (B)
    c.data.packing = "best_fit"  # how documents fill rows: "best_fit", "concat" (split them) or "none" (one per row)
    c.data.truncate = True  # cut documents that are longer than seq_len; False: count such documents as bad rows
    c.data.max_bad = 0.001  # largest fraction of bad rows that is skipped; a larger fraction is an error
    c.data.view = ConfigDict({"name": "next"})  # prediction task: a file in data/views, and its keyword arguments
    c.data.shuffle = True  # shuffle the rows in a new order every epoch, derived from `seed`
    c.data.cache = "~/.cache/kungfu/data"  # folder of tokenized documents, which are reused if the data is unchanged

    c.optim = ConfigDict()
    c.optim.name = one_of("adamw", "adafactor", "lion", "muon")  # muon updates only matrices, adamw everything else
    c.optim.lr = 3e-4  # peak learning rate
    c.optim.schedule = one_of("cosine", "linear", "constant", "wsd")  # wsd: warm-up, constant learning rate, then decay
    c.optim.warmup = 0.05  # length of the warm-up: below 1 a fraction of the steps, otherwise a number of steps
    c.optim.decay = 0.2  # with schedule wsd, the fraction of the steps in which the learning rate decays
    c.optim.final_lr = 0.1  # learning rate at the end, as a fraction of the peak
    c.optim.b1 = 0.9  # decay of the running mean of the gradient
    c.optim.b2 = 0.95  # decay of the running mean of the squared gradient
    c.optim.eps = 1e-8  # added to the square root of the running mean of the squared gradient
    c.optim.weight_decay = 0.0  # applied to matrices only
    c.optim.clip = 1.0  # maximum global norm of the gradient; larger gradients are scaled down; 0: off
    c.optim.lr_scale = ()  # learning-rate factor per parameter path: (("embed/.*", 0.1), ...); the first match counts
    c.optim.max_bad_steps = 3  # number of consecutive non-finite steps, all of them skipped, at which the run stops

    c.mesh = ConfigDict()
    c.mesh.data = -1  # number of devices that split the batch; -1, allowed on one axis, means all remaining devices
    c.mesh.fsdp = 1  # number of devices that split the batch, and shard parameters and optimizer state along embed
    c.mesh.tensor = 1  # number of devices that shard heads, MLP and vocabulary; must divide the number of heads
    c.mesh.context = 1  # number of devices that split each row along its tokens, for long rows; must divide seq_len
    c.xla_preset = ""  # name of a set of TPU compiler flags in train/keep/flags.py; "": none

    c.log_every = 10  # number of steps between two lines of metrics
    c.eval_every = 0  # number of steps between evaluations; 0: evaluate only after the last step
    c.eval_batches = 8  # held-out batches per evaluation
    c.evals = ()  # tasks to score on `eval_n` examples each: names in evals/tasks or FILE:OPTION=VALUE (evals/rows.py)
    c.eval_n = 64  # number of examples scored per task
    c.eval_text = ""  # source of general text; forgetting is the rise of the loss on this text (eval/text_nll)
    c.floors = ()  # metric limits that stop the run: (("eval/dates", ">=", 0.8),); "<=", "drop" and "rise" also work
    c.samples = ()  # prompts that the model answers before and after training; the answers are in metrics.jsonl

    c.ckpt = ConfigDict()
    c.ckpt.every = 100  # number of steps between checkpoints; 0: save only at the end
    c.ckpt.minutes = 10.0  # maximum number of minutes between checkpoints
    c.ckpt.keep = 2  # number of checkpoints to keep, always the newest
    c.ckpt.keep_every = 0  # n > 0 keeps the checkpoint of every n-th step forever
    c.ckpt.on_error = one_of("stop", "continue")  # whether the run stops if a save fails, as on a full disk

    c.tracker = one_of("", "tensorboard", "wandb")  # external service that also receives the metrics
    c.chip = ""  # accelerator whose peak FLOP/s and prices are used; "": the name that the device reports
    return c
