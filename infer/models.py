"""Loads models by name; `infer.load` calls this module."""

import dataclasses
import functools
import hashlib
from pathlib import Path

import jax

from common import files, programs
from common.errors import UserError, reading
from common.packages import locate
from common.types import Config
from configs import schema
from configs.schema import methods
from data.text import formats as tokenizers
from data.text.tokenizer import Absent, NoTokenizer
from infer.lm import LM
from model import build, heads, weights
from model.config import ModelConfig
from model.io import hf, peft_read, saved
from model.io.pretrained import Pretrained, open_pretrained
from model.net.transformer import Transformer
from model.weights import Params, Specs, Tree

SHAPE = "model.json"  # contains the ModelConfig; present only in run folders that contain every parameter


def load(
    name: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
) -> LM:
    """Loads a model that is ready to generate and to score text.

    `name` is a Hugging Face folder, a .gguf file, the name of a packaged model, a hub id, a bundle (see
    infer/bundle.py), a run folder, or the folder RUN/ckpt/STEP of one step of a run. `adapter` is a run folder or a
    PEFT folder whose adapters are added to the model. `dtype` is the number format of weights and activations; None
    means float32 or, for a run, the format in its config. `tokenizer` replaces the tokenizer of the adapter or the
    model. If `strict`, an error is raised if the model's files have contents that are not used. Raises UserError if the
    model cannot be loaded.
    """
    from infer import bundle

    programs.keep()
    if bundle.is_bundle(name):
        if adapter:
            raise UserError("a bundle already contains an adapter", str(adapter), "load one of the two")
        return bundle.load(name, dtype=dtype, tokenizer=tokenizer, strict=strict)
    path = _adapter(adapter) if adapter else None
    opened = open_model(name, strict)
    foreign = path is not None and (path / peft_read.CONFIG).exists()
    if path and not foreign:
        opened = run_at(path, base=opened)
    if path and foreign:
        model = build.network(opened.config, dtype)
        base = opened.load(model.specs, None, model.param_dtype)
        params = peft_read.read(path, strict)(base, model.specs, jax.random.key(0))
    elif isinstance(opened, Run):
        model = opened.model if dtype is None else dataclasses.replace(opened.model, dtype=dtype, param_dtype=dtype)
        params = opened.params(model.specs, None, model.param_dtype)
    else:
        model = build.network(opened.config, dtype)
        params = opened.load(model.specs, None, model.param_dtype) | opened.head()
    own = path and _tokenizer_of(path)
    return LM(model, params, _tokenizer(tokenizer, own or opened.tokenizer_source))


def _tokenizer(named: str | Path | None, source: str) -> tokenizers.Tokenizer | Absent:
    """Loads the tokenizer `named` or, if it is None, the tokenizer in `source`. A model without a tokenizer can still
    be loaded, but works only with token ids."""
    try:
        return tokenizers.load(named or source)
    except NoTokenizer as error:
        if named:
            raise
        return Absent(error)


def _adapter(name: str | Path) -> Path:
    """The local folder of an adapter. A name that is not a local path means a PEFT folder on the hub, which is
    downloaded."""
    path = Path(name).expanduser()
    return path if path.exists() or path.parent.is_dir() else locate(str(name), hf.FILES)


def _tokenizer_of(adapter: Path) -> str:
    """The folder of the tokenizer with which an adapter was trained, or "" if the adapter contains no tokenizer."""
    if (adapter / peft_read.CONFIG).exists():
        return str(adapter) if (adapter / "tokenizer_config.json").exists() else ""
    return run_at(adapter).tokenizer_source


def load_many(
    name: str | Path,
    folders: dict[str, str | Path],
    dtype: str | None = None,
    rank_rows: int | None = None,
    strict: bool = False,
) -> LM:
    """Loads a base model with several LoRA adapters from run folders and PEFT folders. Each prompt can use a different
    adapter.

    Each adapter uses the tokenizer and the chat template with which it was trained. If `name` is a run folder, the
    run's base model is loaded, and quantized as in the run. All adapters are kept in host memory, and `rank_rows`
    limits the total rank of those that are also on the device. `strict` has the same meaning as in `load`. Raises
    UserError if the model or an adapter cannot be loaded.
    """
    from infer.serve.store import RANK_ROWS, Store  # imported only here: it imports Pallas, which is slow
    from model import paged

    lm, paths = load(name, dtype=dtype, strict=strict), {n: _adapter(folder) for n, folder in folders.items()}
    base, specs = weights.base(lm.params), lm.model.specs
    read = {n: paged.factors_of(_adapted(path, base, specs, strict), specs, str(path)) for n, path in paths.items()}
    store, own = Store(lm.model, base, read, rank_rows or RANK_ROWS), _own_tokenizers(paths, lm.tokenizer)
    return dataclasses.replace(lm, params=base, store=store, tokenizers=own)


def _own_tokenizers(folders: dict[str, Path], base: tokenizers.Tokenizer | Absent) -> dict:
    """Returns {adapter: tokenizer} for the adapters whose tokenizer differs from that of the base model."""
    known, out = {}, {}
    for name, folder in folders.items():
        if not (source := _tokenizer_of(folder)):
            continue
        texts = sorted(path for pattern in tokenizers.FILES for path in Path(source).glob(pattern))
        same = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in texts)).digest()
        if same not in known:  # many adapters may share one tokenizer, which is loaded once
            known[same] = tokenizers.load(source)
        if isinstance(base, Absent) or known[same].fingerprint != base.fingerprint:
            out[name] = known[same]
    return out


def _adapted(path: Path, base: Params, specs: Specs, strict: bool) -> Params:
    """Adds the adapter in a folder to a base model. Raises UserError if the adapter was trained by a run with a
    different base model."""
    if (path / peft_read.CONFIG).exists():
        return peft_read.read(path, strict)(base, specs, jax.random.key(0))
    run = run_at(path)
    if not run.cfg.peft.name:
        raise UserError("the run has no adapter", str(path), "load it as a model")
    wrap = build.find("model.peft", run.cfg.peft)()
    return run.with_trained(wrap(base, specs, jax.random.key(run.cfg.seed)))


def before_and_after(source: str | Path, base: str | Path = "") -> tuple[LM, Params]:
    """Loads a fine-tuned model with its adapters, and the dequantized parameters of its base model. `base` may be left
    out for a run folder, whose config names the base model.

    `source` is a run folder, a PEFT folder or a model. Raises UserError if the base model is not known.
    """
    path = Path(source).expanduser()
    run = run_at(path) if is_run(path) else None
    adapter = (path / peft_read.CONFIG).exists() or bool(run and run.cfg.peft.name)
    start = base or (run.cfg.init if run else "")
    if not start and not run:
        raise UserError("the folder does not name its base model", str(source), "name it: --base=MODEL")
    lm = load(start, adapter=source) if adapter and start else load(source)
    if adapter:
        return lm, weights.dense(weights.base(lm.params), lm.model.specs)
    if not start:
        raise UserError("the run started from random weights", str(source), "name its base: --base=MODEL")
    return lm, weights.dense(load(start).params, lm.model.specs)


def open_model(name: str | Path, strict: bool = False) -> "Pretrained | Run":
    """Opens a model: reads its config, but not yet its weights. `strict` does not apply to run folders, since all of
    their files are used."""
    path = Path(name).expanduser()
    return run_at(path) if is_run(path) else open_pretrained(str(name), strict)


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder, or the folder RUN/ckpt/STEP of one step of a run."""
    return (path / "ckpt").is_dir() or _is_step(path)


def run_at(path: Path, base: "Pretrained | Run | None" = None) -> "Run":
    """Opens the run in a folder at its newest step, or at STEP if the folder is RUN/ckpt/STEP."""
    if _is_step(path):
        return Run(path.parents[1], base, int(path.name))
    return Run(path, base)


def _is_step(path: Path) -> bool:
    return path.parent.name == "ckpt" and bool(saved.STEP.fullmatch(path.name)) and path.is_dir()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that is used as a pretrained model. Its newest complete checkpoint is used, or the one at `step`.

    `base` replaces the model that the run's config names as `init`, for example if that model was moved.
    """

    workdir: Path
    base: "Pretrained | Run | None" = None
    step: int | None = None

    @functools.cached_property
    def saved(self) -> saved.Saved:
        return saved.load_params(self.workdir, self.step)

    @functools.cached_property
    def cfg(self) -> Config:
        return schema.recorded(self.saved.config, str(self.workdir / "config.json"))

    @functools.cached_property
    def init(self) -> "Pretrained | Run | None":
        return self.base or (open_model(self.cfg.init) if self.cfg.init else None)

    @functools.cached_property
    def model(self) -> Transformer:
        if (shape := self.workdir / SHAPE).is_file():  # the folder contains every parameter and needs no `init`
            with reading(shape):
                config = ModelConfig.from_dict(files.load_json(shape))
            return build.network(config, self.cfg.model.dtype, self.cfg.model.param_dtype)
        return build.model(self.cfg, self.init, tokenizers.load(self.tokenizer_source).vocab_size)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer_source(self) -> str:
        return str(self.workdir / "tokenizer")

    def load(self, specs: Specs, shardings: Tree = None, dtype: str = "float32") -> Params:
        """Loads parameters from which another run can be initialized. They are dequantized, their adapters are merged,
        and the head is left out."""
        params = self.params(specs, shardings, dtype)
        params.pop("head", None)
        return jax.jit(lambda p: weights.dense(p, specs), out_shardings=shardings)(params)

    def params(self, specs: Specs, shardings: Tree = None, dtype: str = "float32") -> Params:
        """Loads the parameters of the trained model, including adapters and quantized weights.

        Parameters that were frozen in training are computed again from the config. Raises UserError if they differ from
        those in training.
        """
        transform = build.transform(self.cfg, specs)
        if self.cfg.quant.name:
            transform = jax.jit(transform)  # compiled as in training, so that quantization gives the same values
        if (self.workdir / SHAPE).is_file():
            policy = self._headed(jax.eval_shape(transform, self.model.abstract, jax.random.key(0)))
            if saved.named(policy).keys() - {name.removeprefix("policy/") for name in self.saved.params}:
                raise UserError("the folder does not hold every parameter", str(self.workdir))
        else:
            policy = self._headed(transform(self._base(specs, shardings, dtype), jax.random.key(self.cfg.seed)))
        return self.with_trained(policy)

    def _headed(self, policy: Params) -> Params:
        """Adds the head that the run's training objective needs, if any, with its initial values."""
        name = methods.method("objective", self.cfg.objective.name).head
        return policy | {"head": heads.find(name)(self.config, jax.random.key(0))} if name else policy

    def with_trained(self, policy: Params) -> Params:
        """Returns `policy`, which contains the run's initial parameters, with the trained values of all trained
        parameters. Raises UserError if the frozen parameters differ from those in training."""
        if self.cfg.peft.name:
            saved.check_base(self.saved, policy, self.workdir)
        return saved.put(self.saved, policy, self.workdir)

    def _base(self, specs: Specs, shardings: Tree, dtype: str) -> Params:
        if self.init is not None:
            return self.init.load(specs, shardings, dtype)
        return jax.jit(self.model.init, out_shardings=shardings)(jax.random.key(self.cfg.seed))
