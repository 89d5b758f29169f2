"""Every key of an experiment, once, with its meaning. A config file starts from this and says only what differs.

    def get_config():
        c = base.get_config()
        c.init = "smollm2-135m-instruct"
        ...

`--config.key=value` overrides any of them. `configs/schema/rules.py` holds the ranges and the rules between keys.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def one_of(default: str, *_: str) -> str:
    """The default of a key that takes these values and no others; configs/schema/keys.py reads them here."""
    return default


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # everything random derives from it: init, data order, dropout
    c.steps = 1000  # optimizer steps
    c.epochs = 0.0  # passes over the rows of all sources; above 0 it sets `steps`, once the data are read
    c.accum = 1  # micro-batches a step; the batch is split, the result is the same
    c.init = ""  # pretrained start: folder, .gguf, run folder, package-carried name or hub id; "": random
    c.trainable = "all"  # with peft: its adapters alone | "adapters" | a regex on parameter paths
    c.allow = ()  # what a resume may change though it changes the result: "data", "config"

    c.model = ConfigDict()
    c.model.shape = ""  # a name in configs/models.py; "" takes the shape of `init`
    c.model.layers = placeholder(int)  # overrides the shape, as the next four do
    c.model.embed = placeholder(int)  # D; the size of a head is embed / heads
    c.model.heads = placeholder(int)  # N
    c.model.kv_heads = placeholder(int)  # K, divides heads
    c.model.mlp = placeholder(int)  # F
    c.model.vocab_size = placeholder(int)  # unset: the tokenizer's, rounded up to a multiple of 64
    c.model.dtype = one_of("float32", "bfloat16", "float16")  # activations
    c.model.param_dtype = one_of("float32", "bfloat16", "float16")  # weights, optimizer; 16 bits: rounded at random
    c.model.remat = one_of("dots", "none", "full")  # what the backward pass keeps of each layer
    c.model.attention = one_of("auto", "xla", "splash", "cudnn")  # splash: TPU, cudnn: GPU, elsewhere an error

    c.objective = ConfigDict({"name": "sft"})  # a file in train/objectives + its keyword arguments
    c.peft = ConfigDict({"name": ""})  # a file in model/peft + its keyword arguments; "": none
    c.quant = ConfigDict({"name": ""})  # a file in model/quant + its keyword arguments; "": none

    c.data = ConfigDict()
    c.data.source = "pydocs"  # see data/sources.py; several with weights: "pydocs:0.7,sotu:0.3"
    c.data.eval_source = ""  # held-out records; "": a validation split of `source`, else cut by `holdout`
    c.data.holdout = 0.05  # share of the documents kept out of training for held-out loss
    c.data.format = "auto"  # by the columns of the records | one of FORMATS in data/formats.py
    c.data.fields = ""  # rename columns: "prompt=question,completion=answer"
    c.data.tokenizer = ""  # see data/text/tokenizer.py; "": the one of `init`, else bytes
    c.data.chat_template = ""  # FILE | a name in data/text/templates | "none": prompts stay raw; "": the model's own
    c.data.read_control = False  # read control tokens that rows of text spell out, such as rendered chats, as such
    c.data.learn = "all"  # | "last": the answers of a chat that are learnt
    c.data.seq_len = 256  # T
    c.data.batch_size = 8  # B, rows a step over all hosts
    c.data.packing = "best_fit"  # | "concat" (documents are split) | "none" (one a row, padded; answers and labels)
    c.data.truncate = True  # cut documents longer than seq_len; False: they count as bad rows
    c.data.max_bad = 0.001  # share of bad rows skipped before it is an error
    c.data.view = ConfigDict({"name": "next"})  # what a row becomes: a file in data/views + its keyword arguments
    c.data.shuffle = True  # a new order every epoch, from `seed`
    c.data.cache = "~/.cache/kungfu/data"  # tokenized documents, memory-mapped, keyed by fingerprint

    c.optim = ConfigDict()
    c.optim.name = one_of("adamw", "adafactor", "lion", "muon")  # muon: of matrices, adamw of the rest
    c.optim.lr = 3e-4  # peak
    c.optim.schedule = one_of("cosine", "linear", "constant", "wsd")  # wsd: warm up, stay, decay
    c.optim.warmup = 0.05  # share of the steps when < 1, else steps
    c.optim.decay = 0.2  # wsd only: share of the steps of the last phase
    c.optim.final_lr = 0.1  # share of the peak at the end
    c.optim.b1 = 0.9  # decay of the gradient's running mean
    c.optim.b2 = 0.95  # and of its square
    c.optim.eps = 1e-8  # added to the root of that square
    c.optim.weight_decay = 0.0  # on matrices only
    c.optim.clip = 1.0  # global gradient norm; 0: off
    c.optim.lr_scale = ()  # per-path learning rates: (("embed/.*", 0.1), ...), first match wins
    c.optim.max_bad_steps = 3  # non-finite steps in a row before the run stops; each is skipped

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1, on one axis: all that remain
    c.mesh.fsdp = 1  # splits the batch, and parameters and optimizer state along embed
    c.mesh.tensor = 1  # splits heads, mlp and vocabulary; must divide the heads
    c.mesh.context = 1  # splits the tokens of a row, for long ones; must divide seq_len
    c.xla_preset = ""  # compiler flags of TPUs by name, see train/keep/flags.py; "": none

    c.log_every = 10  # steps between two lines of metrics
    c.eval_every = 0  # steps; 0: only after the last step
    c.eval_batches = 8  # held-out batches an evaluation
    c.evals = ()  # names in evals/tasks, scored with `eval_n` examples each
    c.eval_n = 64  # examples a task
    c.eval_text = ""  # data whose text the base knows: the rise of the loss on it, eval/text_nll, is forgetting
    c.floors = ()  # what must hold, or it ends: (("eval/dates", ">=", 0.8), ...) | "<=" | "drop" | "rise" since step 0
    c.samples = ()  # prompts answered before and after training, kept in metrics.jsonl

    c.ckpt = ConfigDict()
    c.ckpt.every = 100  # steps; 0: only at the end
    c.ckpt.minutes = 10.0  # and at least this often
    c.ckpt.keep = 2  # the newest ones
    c.ckpt.keep_every = 0  # and every n-th step for ever
    c.ckpt.on_error = one_of("stop", "continue")  # when a save fails (disk full)

    c.tracker = one_of("", "tensorboard", "wandb")  # receives the same metrics, in the background
    c.chip = ""  # price and peak of this accelerator; "": by the device's own name
    return c
