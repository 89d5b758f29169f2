"""`--plan`: what a run will be and hold, in seconds and without touching a device."""

from typing import Any

from configs.errors import UserError


def describe(cfg: Any, plan: Any) -> dict[str, Any]:
    """Parameters, FLOPs from the equations and bytes per device of a planned run (train.init.Plan)."""
    from train.cost import bytes_per_device, cost

    policy = lambda state: state.params["policy"]
    specs = plan.model.specs
    both = _combined(plan)
    price = cost(plan.model.config, both, specs, plan.mask["policy"], cfg.data.seq_len)
    tokens = cfg.data.batch_size * cfg.data.seq_len
    held = {
        f: bytes_per_device(getattr(plan.abstract, f), getattr(plan.shardings, f))
        for f in ("params", "frozen", "opt_state")
    }
    return {
        "parameters": price.params,
        "trained": price.trained,
        "tokens_per_step": tokens,
        "tokens": tokens * cfg.steps,
        "flops_per_token": price.layer_train_flops + price.head_train_flops,
        "flops_forward_per_token": price.layer_flops + price.head_flops,
        "flops": price.step(tokens, tokens) * cfg.steps,
        "devices": plan.mesh.size,
        "bytes_per_device": {**held, "gradients": held["params"], "total": sum(held.values()) + held["params"]},
    }


def _combined(plan: Any) -> Any:
    from model.weights import combine

    return combine(plan.abstract.params["policy"], plan.abstract.frozen["policy"])


def print_plan(cfg: Any, plan: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    d = describe(cfg, plan)
    table = Table("", "", title="plan", show_header=False, title_justify="left")
    row = lambda k, v: table.add_row(k, v)
    row("parameters", f"{d['parameters']:,} ({d['trained']:,} train, {100 * d['trained'] / d['parameters']:.2f} %)")
    row("tokens a step x steps", f"{d['tokens_per_step']:,} x {cfg.steps:,} = {d['tokens']:,}")
    row(
        "FLOPs a token",
        f"{d['flops_per_token']:.3g} (forward {d['flops_forward_per_token']:.3g}), every target counted",
    )
    row("FLOPs of the run", f"{d['flops']:.3g}")
    for kind, size in d["bytes_per_device"].items():
        row(f"{kind} a device", f"{size / 2**20:,.1f} MiB")
    row("devices", str(d["devices"]))
    console = Console()
    console.print(table)
    console.print("Activations are not in the bytes: they depend on the compiler.")
