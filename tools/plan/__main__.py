"""What a run would hold, send and take on TPUs or GPUs that are not here: its very step, compiled on this CPU.

    python -m tools.plan --config=configs/X.py --topology=v5e:4x4 [--slices=2] [--config.key=value ...] [--json]
    python -m tools.plan --config=configs/X.py --topology=v5p:2x2x1 --search [--minutes=15]
    python -m tools.plan --config=configs/X.py --topology=h100:8
    python -m tools.plan --config=configs/X.py --parameters [--devices=16]

`--slices=2` joins two of them by the data center's network, over the data axis. `--what=decode` plans one token of
`data.batch_size` rows behind a cache of `data.seq_len`. `--search` tries meshes, remat policies, batches and
accumulation, and ranks what fits by planned tokens/s; it begins no plan after `--minutes`. TPUs need
requirements/tpu.txt, and H100s, up to eight of a machine, requirements/gpu.txt. `--parameters` says where every
parameter is placed on the mesh: its shape, its axes, its bytes per device; an axis of -1 takes what remains of
`--devices`, and counts as 1 without it. Exit code 2: the input must change, or
the plan does not fit.
"""

import json
import math
import sys
import time
from typing import Any

from common import cli, exits
from common.errors import UserError
from common.numbers import size, span
from common.types import Config, Json
from configs import schema
from tools.plan import parameters, topology
from train.keep import flags as presets

FLAGS = {
    "topology": "", "slices": 1, "what": "train", "search": False, "minutes": 15.0, "json": False, "parameters": False,
    "devices": 0,
}  # fmt: skip


@cli.command
def main(argv: list[str]) -> int | None:
    loaded = schema.load(argv, flags=FLAGS, usage=__doc__)
    cfg, flags = loaded.config, loaded.flags
    if flags["what"] not in ("train", "decode"):
        raise UserError(f"cannot plan {flags['what']!r}", "--what", "train or decode")
    if flags["parameters"]:
        print(parameters.table(cfg, flags["devices"]))
        return exits.DONE
    presets.apply(cfg.xla_preset)
    devices = topology.devices(flags["topology"], flags["slices"])
    found = search(cfg, devices, flags) if flags["search"] else plan(cfg, devices, flags)
    if flags["json"]:
        print(json.dumps(found, indent=1))
    elif flags["search"]:
        rank(found)
    else:
        show(found)
    fits = bool(found) if flags["search"] else found["fits"]
    return exits.DONE if fits else exits.INPUT


def plan(cfg: Config, devices: list[Any], flags: Json) -> Json:
    """One config on one slice; see tools.plan.step."""
    from tools.plan import step
    from train import inputs

    name = f"{flags['slices']} x {flags['topology']}" if flags["slices"] > 1 else flags["topology"]
    return {"topology": name} | step.plan(cfg, inputs.model(cfg), devices, flags["what"])


def search(cfg: Config, devices: list[Any], flags: Json) -> list[Json]:
    """What fits, by planned tokens/s, of what was tried within `--minutes`.

    First every remat policy with all devices on fsdp; then the best of them with 2, 4 or 8 on tensor, as long as that
    gains. Each starts from the best batch so far, at first the config's: rows are halved until they fit, or doubled
    while that gains 2 %. At the end a config's batch that is larger than the best is tried in parts of that size.
    """
    from train import inputs

    found: list[Json] = []
    end = time.monotonic() + 60 * flags["minutes"]

    def attempt(changes: Json) -> float:
        """Planned tokens/s, the geometric mean of the range; 0 when it does not fit, or when time is over."""
        if time.monotonic() > end:
            return 0.0
        changed, _ = schema.resolve(cfg, changes)
        got = plan(changed, devices, flags)
        rate = math.prod(got["tokens_per_second"]) ** 0.5 if got["fits"] else 0.0
        told = f"{rate:,.0f} tokens/s" if rate else "does not fit"
        print(" ".join(f"{k}={v}" for k, v in changes.items()), "·", told, file=sys.stderr, flush=True)
        found.extend([got | {"changes": changes, "rank": rate}] if rate else [])
        return rate

    def climb(tensor: int, remat: str, rows: int) -> tuple[float, int, str]:
        """(tokens/s, rows, remat) of the batch where a mesh does best."""
        shards = len(devices) // tensor
        mesh = {"mesh.data": 1, "mesh.fsdp": shards, "mesh.tensor": tensor, "model.remat": remat}
        rows = start = max(rows // shards, 1) * shards
        while not (rate := attempt(mesh | {"data.batch_size": rows, "accum": 1})) and rows >= 2 * shards:
            rows = rows // shards // 2 * shards
        while (
            rate and rows >= start and (new := attempt(mesh | {"data.batch_size": 2 * rows, "accum": 1})) > 1.02 * rate
        ):
            rows, rate = 2 * rows, new
        return rate, rows, remat

    best = (0.0, cfg.data.batch_size, "full")
    for remat in ("full", "dots", "none"):
        best = max(best, climb(1, remat, best[1]))
    for tensor in (t for t in (2, 4, 8) if math.gcd(len(devices), inputs.model(cfg).config.heads) % t == 0):
        before, best = best, max(best, climb(tensor, best[2], best[1]))
        if best == before:
            break
    whole, accum = cfg.data.batch_size, cfg.data.batch_size // best[1]
    if found and flags["what"] == "train" and accum > 1 and whole == accum * best[1]:
        attempt(max(found, key=lambda p: p["rank"])["changes"] | {"data.batch_size": whole, "accum": accum})
    return sorted(found, key=lambda p: -p["rank"])


def show(p: Json) -> None:
    """Prints one plan."""
    d = p["config"]
    rows = [("slice", f"{p['topology']}, {d['devices']} devices of type {p['device']}: {axes(p['mesh'])}")]
    rows += [("step", f"{p['what']}, {p['rows']} rows, accum {p['accum']}; attention: {d['attention']}")]
    rows += [("parameters", f"{d['parameters']:,}, of which {d['trained']:,} train")]
    rows += [(f"{kind.replace('_', ' ')} a device", size(n)) for kind, n in p["bytes"].items()]
    if not p["fits"]:
        return table([*rows, ("fits", f"no: {p['verdict']}"), ("turn", p["turn"])])
    rows += [("fits", f"yes: {p['verdict']}")]
    rows += [("a large array", f"{size(n)} {shape} of {source}") for n, shape, source in p["largest"]]
    for axis, kinds in p["sent"].items():
        text = ", ".join(f"{kind} {size(n)}" for kind, n in sorted(kinds.items()))
        rows += [(f"sent over {axis}", f"{text} a device and step")]
    rows += [("FLOPs a step", f"{p['flops_per_step']:.4g}, with recomputation {p['flops_with_recomputation']:.4g}")]
    rows += [(f"{name} alone", span(t, ",.4f") + " s") for name, t in p.get("seconds_by", {}).items()]
    rows += [("a step", span(p.get("seconds"), ",.4f") + " s"), ("tokens/s", span(p.get("tokens_per_second")))]
    rows += [("MFU", span(p.get("mfu"), ".1%") + " at these bounds")]
    rows += [(f"whole run: {name.replace('_', ' ')}", span(v, ",.1f")) for name, v in p.get("run", {}).items()]
    table(rows, *p["assumed"])


def rank(found: list[Json]) -> None:
    """Prints what fits, the fastest first."""
    told = lambda p: " ".join(f"--config.{k}={v}" for k, v in p["changes"].items())
    line = lambda p: (f"{span(p['tokens_per_second'])} tokens/s", f"peak {size(p['bytes']['peak'])}", told(p))
    table([line(p) for p in found] or [("nothing fits",)])


def axes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{a} {n}" for a, n in mesh.items() if n > 1) or "one"


def table(rows: list[tuple[str, ...]], *notes: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_header=False)
    for row in rows:
        grid.add_row(*map(Text, row))  # a shape in brackets is no markup
    Console(highlight=False).print(grid, *notes, sep="\n", markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
