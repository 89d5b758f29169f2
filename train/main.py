"""Trains what a config file says, or shows what that would be.

    python -m train.main --config=configs/sft/tiny.py --workdir=runs/tiny [--config.key=value ...] [--plan]

--plan shows what the run would hold; --debug examines one step and the batch of it; --profile=N traces N steps.

Exit codes: 0 done, 2 the input must change, 70 the numbers broke down, 71 a figure crossed one of config.floors,
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
        raise UserError("no run folder", "--workdir", "name one, as --workdir=runs/first; the same one resumes")
    return run(loaded)


def show_plan(cfg: Config) -> int:
    """Prints what the run would hold and cost. No device is touched: -1 in the mesh counts as 1."""
    from train import plan

    plan.show(cfg, plan.blueprint(cfg))
    return 0


def run(loaded: schema.Loaded) -> int:
    """Trains what a validated config says, in its folder, from the newest whole checkpoint on."""
    began = time.perf_counter()
    from train import flow

    return flow.run(loaded, began)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
