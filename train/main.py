"""Trains a model as a config file specifies, or shows the plan of the run.

    python -m train.main --config=configs/sft/tiny.py --workdir=runs/tiny [--config.key=value ...] [--plan]

--plan prints the size and cost of the run; --debug examines one step and its batch; --profile=N traces N steps.

Exit codes: 0 done, 2 bad input, 70 loss or gradients stayed non-finite, 71 a metric crossed one of config.floors,
75 preempted: run the same command again.
"""

import sys
import time

from common import cli
from common.errors import UserError
from common.types import Config
from configs import schema


@cli.command
def main(argv: list[str]) -> int:
    loaded = schema.load(argv, flags={"plan": False, "debug": False, "profile": 0})
    if loaded.flags["plan"]:
        return show_plan(loaded.config)
    if loaded.flags["debug"]:
        from train import debug

        return debug.run(loaded.config, loaded.workdir)
    if not loaded.workdir:
        fix = "name one, such as --workdir=runs/first; naming it again resumes the run"
        raise UserError("no run folder is given", "--workdir", fix)
    return run(loaded)


def show_plan(cfg: Config) -> int:
    """Prints the size and the cost of the run. No device is used, so a mesh axis of -1 counts as 1."""
    from train import plan

    plan.show(cfg, plan.blueprint(cfg))
    return 0


def run(loaded: schema.Loaded) -> int:
    """Trains in the run folder as the validated config specifies. Resumes from the newest complete checkpoint if there
    is one."""
    began = time.perf_counter()
    from train import flow

    return flow.run(loaded, began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
