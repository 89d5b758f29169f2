"""`--plan` prints the size and cost of a run, without using any device."""

from pathlib import Path

from common import files
from common.numbers import size
from common.types import Config, Json
from data.rows.batch import KINDS
from train import cost, init, inputs, mesh
from train.init import Blueprint


def blueprint(cfg: Config, devices: int = 0) -> Blueprint:
    """Plans a run from its config, without real devices. If the number of devices is unknown (0), a mesh axis of -1
    counts as 1."""
    return init.blueprint(cfg, inputs.model(cfg), mesh.abstract_mesh(cfg.mesh, devices))


def describe(cfg: Config, plan: Blueprint) -> Json:
    """Returns a run's size and cost: the number of parameters of its policy, the FLOPs of all roles, and the bytes per
    device."""
    roles = cost.of_roles(plan, cfg.data.seq_len)
    policy, price = roles["policy"], cost.of_plan(plan, cfg.data.seq_len)
    tokens = cfg.data.batch_size * cfg.data.seq_len * len(KINDS[plan.objective.batch].sides)
    held = {
        field: cost.bytes_per_device(getattr(plan.abstract, field), getattr(plan.shardings, field))
        for field in ("params", "frozen", "opt_state")
    }
    held["gradients"] = held["params"]
    return {
        "parameters": policy.params,
        "trained": policy.trained,
        "tokens_per_step": tokens,
        "tokens": tokens * cfg.steps,
        "flops_per_token": price.layer_train_flops + price.head_train_flops,
        "flops_forward_per_token": policy.layer_flops + policy.head_flops,
        "flops": price.step(tokens, tokens) * cfg.steps,
        "devices": plan.mesh.size,
        "attention": plan.attention,
        "bytes_per_device": held | {"total": sum(held.values())},
    }


def show(cfg: Config, plan: Blueprint, path: Path | None = None) -> None:
    """Prints the plan, and saves it at `path` if given."""
    from rich.console import Console
    from rich.table import Table

    from train.keep import hosts

    d = describe(cfg, plan)
    if path and not hosts.primary():
        return
    if path:
        files.write_json(path, d)
    table = Table(show_header=False)
    share = 100 * d["trained"] / d["parameters"]
    table.add_row("parameters", f"{d['parameters']:,}, of which {d['trained']:,} train ({share:.2f} %)")
    table.add_row("tokens", f"{d['tokens_per_step']:,} per step x {cfg.steps:,} steps = {d['tokens']:,} at most")
    if cfg.epochs and not path:
        note = f"{cfg.epochs:g}: the number of steps depends on the data; {cfg.steps:,} are assumed here"
        table.add_row("epochs", note)
    table.add_row(
        "FLOPs per token", f"{d['flops_per_token']:.3g} in training, {d['flops_forward_per_token']:.3g} forward"
    )
    table.add_row("FLOPs of the run", f"{d['flops']:.3g} at most: less with padding and masked targets")
    for kind, held in d["bytes_per_device"].items():
        table.add_row(f"{kind.replace('_', ' ')} per device", size(held))
    axes = ", ".join(f"{a} {n}" for a, n in plan.mesh.shape.items() if n > 1)
    table.add_row("devices", f"{d['devices']} ({axes})" if axes else "1")
    if plan.attention:
        table.add_row("attention", plan.attention)
    Console().print(table, "Activations need additional memory, which depends on the compiler.", sep="\n")
