"""The flow of a run, from a config to a trained, resumable, measured model.

    python -m train.main --config=configs/sft/tiny.py --workdir=runs/tiny [--config.key=value ...] [--plan]

Exit codes: 0 done, 2 the input must change, 70 the numbers broke down, 75 preempted: run the same command again.
"""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

from configs import schema
from configs.errors import UserError


def main(argv: list[str]) -> int:
    try:
        loaded = schema.load(argv, flags={"plan": False})
        if loaded.flags["plan"]:
            from train import plan

            plan.show(loaded.config)
            return 0
        return run(loaded)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2


def run(loaded: Any) -> int:
    """Trains what a validated config says, in its run folder, from the newest valid checkpoint on."""
    import jax

    from train import build, evaluate
    from train.checkpoint import Checkpointer
    from train.mesh import BATCH, make_mesh
    from train.metrics import Metrics
    from train.runs import RunDir
    from train.step import make_step

    cfg = loaded.config
    build.distribute()
    with RunDir(loaded) as run, Metrics(run, cfg) as metrics:
        mesh = make_mesh(cfg.mesh)
        with jax.set_mesh(mesh), build.rules():
            ...
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
