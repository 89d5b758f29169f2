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
    """Returns the default. The arguments, of which the default is the first, are the allowed values of the key.
    configs/schema/keys.py reads them from this file's source."""
    return default


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # random seed of the initial weights, the order of the data, and dropout
    c.steps = 1000  # optimizer steps
    c.epochs = 0.0  # passes over all training rows; if above 0, `epochs` determines `steps`
    c.accum = 1  # micro-batches per step (gradient accumulation); more of them use less memory, with the same result
    c.init = ""  # initial weights: a model or run folder, .gguf file, packaged model or hub id; "": random weights
    c.trainable = "all"  # what to train: "all" (with peft: only the adapters), "adapters" or a regex on parameter paths
    c.allow = ()  # changes to accept when a run resumes, although its result may change: "data", "config"

    c.model = ConfigDict()
    c.model.shape = ""  # name of a model shape in configs/models.py; "": the shape of the model in `init`
    c.model.layers = placeholder(int)  # overrides the number of layers of `model.shape`
    c.model.embed = placeholder(int)  # overrides the model width (D) of `model.shape`; the head size is embed / heads
    c.model.heads = placeholder(int)  # overrides the number of query heads (N) of `model.shape`
    c.model.kv_heads = placeholder(int)  # overrides the number of key-value heads (K); must divide `model.heads`
    c.model.mlp = placeholder(int)  # overrides the hidden width of the MLP (F)
    c.model.vocab_size = placeholder(int)  # vocabulary size; if unset, the tokenizer's, rounded up to a multiple of 64
    c.model.dtype = one_of("float32", "bfloat16", "float16")  # data type of activations
    c.model.param_dtype = one_of("float32", "bfloat16", "float16")  # type of weights; stochastic rounding if 16-bit
    c.model.remat = one_of("dots", "none", "full")  # backward pass recomputes all but matmuls (dots), or all (full)
    c.model.attention = one_of("auto", "xla", "splash", "cudnn")  # attention kernel; splash needs a TPU, cudnn a GPU

    c.objective = ConfigDict({"name": "sft"})  # training objective: a file in train/objectives, with its arguments
    c.peft = ConfigDict({"name": ""})  # PEFT method: a file in model/peft, with its keyword arguments; "": none
    c.quant = ConfigDict({"name": ""})  # quantizer: a file in model/quant, with its keyword arguments; "": none

    c.data = ConfigDict()
    c.data.source = "pydocs"  # training data (see data/sources.py); "pydocs:0.7,sotu:0.3" mixes two sources
    c.data.eval_source = ""  # held-out data; "": the validation split of `source`, or else the fraction `holdout`
    c.data.holdout = 0.05  # fraction of the documents that is held out from training, to measure the held-out loss
    c.data.format = "auto"  # record format: one of FORMATS in data/formats.py, or "auto" to detect it from the columns
    c.data.fields = ""  # columns to rename, as NEW=OLD: "prompt=question,completion=answer"
    c.data.tokenizer = ""  # tokenizer (see data/text/tokenizer.py); "": the tokenizer of `init`, or else bytes
    c.data.chat_template = ""  # file, or name in data/text/templates; "none": raw prompts; "": the model's own template
    c.data.read_control = False  # parse control tokens in the data's text; needed if chats are already rendered
    c.data.learn = "all"  # which answers in a chat the loss is computed on: "all" or "last"
    c.data.seq_len = 256  # tokens per row (T)
    c.data.batch_size = 8  # rows per step over all hosts (B)
    c.data.packing = "best_fit"  # how documents fill rows: "best_fit", "concat" (split them) or "none" (one per row)
    c.data.truncate = True  # cut documents that are longer than seq_len; False: count such documents as bad rows
    c.data.max_bad = 0.001  # bad rows are skipped up to this fraction of all rows; a larger fraction is an error
    c.data.view = ConfigDict({"name": "next"})  # prediction task: a file in data/views, with its arguments
    c.data.shuffle = True  # shuffle the rows in a new order every epoch, derived from `seed`
    c.data.cache = "~/.cache/kungfu/data"  # cache of tokenized documents, reused while the data is unchanged

    c.optim = ConfigDict()
    c.optim.name = one_of("adamw", "adafactor", "lion", "muon")  # muon updates only matrices, and adamw the rest
    c.optim.lr = 3e-4  # peak learning rate
    c.optim.schedule = one_of("cosine", "linear", "constant", "wsd")  # wsd: warm-up, constant learning rate, then decay
    c.optim.warmup = 0.05  # length of the warm-up: below 1 a fraction of the steps, otherwise a number of steps
    c.optim.decay = 0.2  # for wsd: length of the decay at the end of the run, as a fraction of the steps
    c.optim.final_lr = 0.1  # learning rate at the end, as a fraction of the peak
    c.optim.b1 = 0.9  # decay rate of the running mean of the gradient
    c.optim.b2 = 0.95  # decay rate of the running mean of the squared gradient
    c.optim.eps = 1e-8  # added to the square root of the running mean of the squared gradient
    c.optim.weight_decay = 0.0  # weight decay; applied to matrices only
    c.optim.clip = 1.0  # maximum global norm of the gradient; larger gradients are scaled down; 0: off
    c.optim.lr_scale = ()  # learning-rate factor per parameter path: (("embed/.*", 0.1), ...); the first match counts
    c.optim.max_bad_steps = 3  # non-finite steps are skipped; the run stops after this many in a row

    c.mesh = ConfigDict()
    c.mesh.data = -1  # number of devices that split the batch; -1, allowed on one axis, means all remaining devices
    c.mesh.fsdp = 1  # number of devices that split the batch, and shard weights and optimizer state by model width
    c.mesh.tensor = 1  # number of devices that shard heads, MLP and vocabulary; must divide the number of heads
    c.mesh.context = 1  # number of devices that split each row along its tokens, for long rows; must divide seq_len
    c.xla_preset = ""  # name of a set of TPU compiler flags in train/keep/flags.py; "": none

    c.log_every = 10  # number of steps between two lines of metrics
    c.eval_every = 0  # number of steps between evaluations; 0: evaluate only after the last step
    c.eval_batches = 8  # held-out batches per evaluation
    c.evals = ()  # tasks to score on `eval_n` examples each: names in evals/tasks or FILE:OPTION=VALUE (evals/rows.py)
    c.eval_n = 64  # number of examples scored per task
    c.eval_text = ""  # source of general text; forgetting is the increase in the loss on it (eval/text_nll)
    c.floors = ()  # the run stops if a metric breaks a limit: (("eval/dates", ">=", 0.8),); also "<=", "drop", "rise"
    c.samples = ()  # prompts that the model answers before and after training; the answers are in metrics.jsonl

    c.ckpt = ConfigDict()
    c.ckpt.every = 100  # number of steps between checkpoints; 0: save only at the end
    c.ckpt.minutes = 10.0  # maximum number of minutes between checkpoints
    c.ckpt.keep = 2  # number of newest checkpoints to keep
    c.ckpt.keep_every = 0  # if n > 0, checkpoints at steps that are multiples of n are never deleted
    c.ckpt.on_error = one_of("stop", "continue")  # what to do if a save fails, for example on a full disk

    c.tracker = one_of("", "tensorboard", "wandb")  # experiment tracker that also receives the metrics
    c.chip = ""  # chip in common/chips.json, for its peak FLOP/s and price; "": the chip that the device reports
    return c
