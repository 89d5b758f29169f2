"""Makes a table of a run's parameters with their shapes, logical axes, mesh axes and bytes per device."""

from typing import Any

from common.types import Config


def table(cfg: Config, devices: int = 0) -> str:
    """Returns a table with one line per parameter and a line for the sum of their bytes. "*" marks trained parameters.
    Models in other roles than the policy, such as a reference model, are not listed."""
    from model import weights
    from train import cost
    from train.plan import blueprint

    plan = blueprint(cfg, devices)
    policy, places = plan.abstract.role("policy"), plan.shardings.role("policy")
    rows = [("parameter", "shape", "dtype", "logical axes", "mesh axes", "bytes per device")]

    def row(path: str, x: Any, place: Any, names: tuple, trains: bool) -> None:
        axes = ", ".join(str(a or "-") for a in place.spec)
        size = cost.bytes_per_device(x, place)
        name, shape = f"{path} *" if trains else path, " x ".join(map(str, x.shape))
        rows.append((name, shape, str(x.dtype), ", ".join(names), axes, f"{size:,}"))

    weights.map_named(row, policy, places, weights.axes(policy, plan.model.specs), plan.mask["policy"])
    rows.append(("all", "", "", "", "", f"{cost.bytes_per_device(policy, places):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(r, widths, strict=True)).rstrip() for r in rows]
    shape = ", ".join(f"{a} {n}" for a, n in plan.mesh.shape.items() if n > 1)
    return "\n".join([f"mesh: {shape or 'one device'}; *: trained", *lines])
