"""Loads a trained adapter from a run folder or a PEFT folder, to continue its training in a new stage."""

from pathlib import Path

import jax

from common.errors import UserError
from configs import schema
from model import build
from model.io import peft_read, saved
from model.weights import Params, Specs, Transform


def check_base(folder: str, policy: Params) -> None:
    """Raises UserError if the adapter in `folder` was not trained on the base model of `policy`.

    A PEFT folder is not checked, because it contains no fingerprint of its base model.
    """
    if not (Path(folder).expanduser() / peft_read.CONFIG).exists():
        saved.check_base(saved.load_params(folder, verified=False), policy, folder)


def make(*, folder: str) -> Transform:
    """Returns a Transform that adds the adapter in `folder` to its base model.

    If `folder` is a run folder, reads its newest complete checkpoint. Raises UserError if the folder has no adapter.
    """
    path = Path(folder).expanduser()
    if (path / peft_read.CONFIG).exists():
        return peft_read.read(path)
    run = saved.load_params(path)
    cfg = schema.recorded(run.config, str(folder))
    if not cfg.peft.name:
        fix = "set config.init to this folder instead of config.peft.folder"
        raise UserError("the run trained no adapter", folder, fix)
    wrap = build.find("model.peft", cfg.peft)()

    def transform(params: Params, specs: Specs, key: jax.Array) -> Params:
        return saved.put(run, wrap(params, specs, jax.random.key(cfg.seed)), folder)

    return transform
