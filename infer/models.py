"""Models by name: what `infer.load` opens."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax

from configs import schema
from configs.errors import UserError
from data import tokenizer as tokenizers
from infer.lm import LM
from model import build, saved, weights
from model.config import ModelConfig
from model.pretrained import Pretrained, open_pretrained
from model.transformer import Transformer
from model.weights import Params, Specs

SHAPE = "model.json"  # the ModelConfig, in a folder that holds every parameter


def load(name: str | Path, adapter: str | Path | None = None, dtype: str | None = None) -> LM:
    """A model that is ready to generate and to score.

    `name`: a Hugging Face folder, a .gguf file, a packaged model's name, a hub id, or a run folder. `adapter`: a run
    folder whose adapters are put on the model. `dtype` of weights and activations; None: float32, or the run's own.
    Raises UserError.
    """
    opened = Run(Path(adapter), base=open_model(name)) if adapter else open_model(name)
    if isinstance(opened, Run):
        model = opened.model if dtype is None else dataclasses.replace(opened.model, dtype=dtype, param_dtype=dtype)
        params = opened.params(model.specs, None, model.param_dtype)
    else:
        model = Transformer(opened.config, dtype or "float32", dtype or "float32")
        params = opened.load(model.specs, None, model.param_dtype)
    return LM(model, params, tokenizers.load(opened.tokenizer_source))


def open_model(name: str | Path) -> "Pretrained | Run":
    """An opened model: its shape is known, its weights are not read yet."""
    path = Path(name).expanduser()
    return Run(path) if (path / "ckpt").is_dir() else open_pretrained(str(name))


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder as a pretrained model. `base` stands for the `init` of its config when that lies elsewhere now."""

    workdir: Path
    base: "Pretrained | Run | None" = None

    @functools.cached_property
    def saved(self) -> saved.Saved:
        return saved.load_params(self.workdir)

    @functools.cached_property
    def cfg(self) -> Any:
        return schema.from_dict(self.saved.config)

    @functools.cached_property
    def init(self) -> "Pretrained | Run | None":
        return self.base or (open_model(self.cfg.init) if self.cfg.init else None)

    @functools.cached_property
    def model(self) -> Transformer:
        if (shape := self.workdir / SHAPE).is_file():  # the folder holds every parameter, and needs no `init`
            try:
                config = ModelConfig.from_dict(json.loads(shape.read_text()))
            except (ValueError, TypeError) as e:
                raise UserError(f"is not the shape of a model: {e}", str(shape)) from None
            return Transformer(config, self.cfg.model.dtype, self.cfg.model.param_dtype)
        return build.model(self.cfg, self.init, tokenizers.load(self.tokenizer_source).vocab_size)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer_source(self) -> str:
        return str(self.workdir / "tokenizer")

    def load(self, specs: Specs, shardings: Any = None, dtype: str = "float32") -> Params:
        """Plain parameters, adapters merged: what a run starts from whose `init` is this folder."""
        params = self.params(specs, shardings, dtype)
        return jax.jit(lambda p: weights.dense(p, specs), out_shardings=shardings)(params)

    def params(self, specs: Specs, shardings: Any = None, dtype: str = "float32") -> Params:
        """The policy as it was trained, with its adapters and quantised leaves.

        What was not trained is derived from the config, as training did. Raises UserError when it is not the same.
        """
        transform = build.transform(self.cfg, specs)
        if self.cfg.quant.name:
            transform = jax.jit(transform)  # compiled as in training: the codes come out the same
        learnt = {k.removeprefix("policy/"): v for k, v in self.saved.params.items() if k.startswith("policy/")}
        if (self.workdir / SHAPE).is_file():
            policy = jax.eval_shape(transform, self.model.abstract, jax.random.key(0))
        else:
            policy = transform(self._base(specs, shardings, dtype), jax.random.key(self.cfg.seed))
        names = set(saved.named(policy))
        if strange := learnt.keys() - names:
            raise UserError(f"the run has learnt {min(strange)}, which its config does not have", str(self.workdir))
        frozen = weights.map_named(lambda path, x: None if path in learnt else x, policy)
        if self.cfg.peft.name and self.saved.frozen not in ("", saved.fingerprint({"policy": frozen})):
            raise UserError("its adapters were trained on another base than this one", str(self.workdir))
        return weights.map_named(lambda path, x: _like(learnt.get(path), x), policy)

    def _base(self, specs: Specs, shardings: Any, dtype: str) -> Params:
        if self.init is not None:
            return self.init.load(specs, shardings, dtype)
        return jax.jit(self.model.init, out_shardings=shardings)(jax.random.key(self.cfg.seed))


def _like(value: Any, x: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """`value` in the type and the place of `x`; `x` itself without one."""
    if value is None:
        if not isinstance(x, jax.Array):
            raise UserError("it does not hold every parameter", "run folder")
        return x
    if value.shape != x.shape:
        raise UserError(f"a saved parameter has shape {value.shape}, the model wants {x.shape}", "run folder")
    return jax.device_put(value.astype(x.dtype), x.sharding)
