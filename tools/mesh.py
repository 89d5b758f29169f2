"""Where every parameter of a run lies: its shape, logical axes, place on the mesh, and bytes on one device.

    python -m tools.mesh --config=configs/X.py [--config.mesh.fsdp=16 ...] [--devices=N]

No device is touched. An axis of -1 takes what remains of `--devices`; without it, it counts as 1.
"""

import sys
from typing import Any

from common.errors import UserError
from configs import schema


def main(argv: list[str]) -> int:
    try:
        loaded = schema.load(argv, flags={"devices": 0}, usage=__doc__)
        print(table(loaded.config, loaded.flags["devices"]))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


def table(cfg: Any, devices: int = 0) -> str:
    """A line for every parameter and for the whole; "*" marks those that train. Roles beside the policy are copies."""
    from model import build, weights
    from train import cost, init, inputs, mesh

    start = inputs.pretrained(cfg)
    model = build.model(cfg, start, inputs.vocabulary(cfg, start))
    plan = init.plan(cfg, model, mesh.abstract_mesh(cfg.mesh, devices))
    both = lambda state: weights.combine(state.params["policy"], state.frozen["policy"])
    policy, places = both(plan.abstract), both(plan.shardings)
    rows = [("parameter", "shape", "dtype", "logical axes", "mesh axes", "bytes a device")]

    def row(path: str, x: Any, place: Any, names: tuple, trains: bool) -> None:
        axes = ", ".join(str(a or "-") for a in place.spec)
        size = cost.bytes_per_device(x, place)
        name, shape = path + " *" * trains, " x ".join(map(str, x.shape))
        rows.append((name, shape, str(x.dtype), ", ".join(names), axes, f"{size:,}"))

    weights.map_named(row, policy, places, weights.axes(policy, model.specs), plan.mask["policy"])
    rows.append(("all", "", "", "", "", f"{cost.bytes_per_device(policy, places):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(r, widths, strict=True)).rstrip() for r in rows]
    shape = ", ".join(f"{a} {n}" for a, n in plan.mesh.shape.items() if n > 1)
    return "\n".join([f"mesh: {shape or 'one device'}; * trains", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
