"""An adapter that exists: the one of a run folder or of a PEFT folder, to go on with in a new stage."""

from pathlib import Path

import jax

from common.errors import UserError
from configs import schema
from model import build
from model.io import peft_read, saved
from model.weights import Params, Specs, Transform


def check_base(folder: str, policy: Params) -> None:
    """Raises UserError when the adapter of `folder`, which `policy` holds, was trained on another base.

    Only a run folder says what its base was; a PEFT folder does not.
    """
    if not (Path(folder).expanduser() / peft_read.CONFIG).exists():
        saved.check_base(saved.load_params(folder, verified=False), policy, folder)


def make(*, folder: str) -> Transform:
    """A Transform that puts the adapter of `folder` on the base that it was trained on.

    A run folder gives its newest whole checkpoint. Raises UserError for a folder that holds no adapter.
    """
    path = Path(folder).expanduser()
    if (path / peft_read.CONFIG).exists():
        return peft_read.read(path)
    run = saved.load_params(path)
    cfg = schema.recorded(run.config, str(folder))
    if not cfg.peft.name:
        raise UserError("the run has trained no adapter", folder, "use it as config.init")
    wrap = build.find("model.peft", cfg.peft)()

    def transform(params: Params, specs: Specs, key: jax.Array) -> Params:
        return saved.put(run, wrap(params, specs, jax.random.key(cfg.seed)), folder)

    return transform
