"""Estimates the memory, communication and speed of a run on TPUs or GPUs, by compiling its step on this CPU.

    python -m tools.plan --config=configs/X.py --topology=v5e:4x4 [--slices=2] [--config.key=value ...] [--json]
    python -m tools.plan --config=configs/X.py --topology=v5p:2x2x1 --search [--minutes=15]
    python -m tools.plan --config=configs/X.py --topology=h100:8
    python -m tools.plan --config=configs/X.py --parameters [--devices=16]

The TPUs or GPUs need not be present. Plans for TPUs need the packages of requirements/tpu.txt. Plans for H100s need
those of requirements/gpu.txt, and are limited to one machine with up to eight H100s. `--slices=2` plans for two TPU
slices that are connected by the data center network, along the mesh axis `data`. `--what=decode` plans one decoding
step of `data.batch_size` rows with a cache of `data.seq_len` tokens.

`--search` tries meshes, remat policies, batch sizes and gradient accumulation, and sorts the settings that fit into
memory by their estimated tokens/s. It starts no new trial after `--minutes`. `--parameters` prints the shape, mesh axes
and bytes per device of every parameter. With it, a mesh axis of -1 takes all remaining `--devices` (default: 1). Exit
code 2 means that the input is invalid or that the run does not fit into memory.
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
    """Plans one step of a config on the given devices (see tools.plan.step)."""
    from tools.plan import step
    from train import inputs

    name = f"{flags['slices']} x {flags['topology']}" if flags["slices"] > 1 else flags["topology"]
    return {"topology": name} | step.plan(cfg, inputs.model(cfg), devices, flags["what"])


def search(cfg: Config, devices: list[Any], flags: Json) -> list[Json]:
    """Tries settings until `--minutes` have passed, and returns the plans that fit into memory, the fastest first.

    The search first tries every remat policy with all devices on the axis fsdp. It then tries the best policy with 2, 4
    and 8 devices on the axis tensor, and stops when more devices on that axis are not faster. The very first trial has
    the config's batch size. For each further mesh or policy, the search starts with the best batch size so far. It
    halves the batch size until the plan fits, or doubles it as long as that raises the speed by more than 2 %. Finally,
    if the config's batch size is a multiple of the best one, it is tried with gradient accumulation.
    """
    from train import inputs

    found: list[Json] = []
    end = time.monotonic() + 60 * flags["minutes"]

    def attempt(changes: Json) -> float:
        """Returns the estimated tokens/s (the geometric mean of the range), or 0 if the plan does not fit or if the
        time is up."""
        if time.monotonic() > end:
            return 0.0
        changed, _ = schema.resolve(cfg, changes)
        got = plan(changed, devices, flags)
        rate = math.prod(got["tokens_per_second"]) ** 0.5 if got["fits"] else 0.0
        result = f"{rate:,.0f} tokens/s" if rate else "does not fit"
        print(" ".join(f"{k}={v}" for k, v in changes.items()), "·", result, file=sys.stderr, flush=True)
        if rate:
            found.append(got | {"changes": changes, "rank": rate})
        return rate

    def climb(tensor: int, remat: str, rows: int) -> tuple[float, int, str]:
        """Returns (tokens/s, rows, remat) for the batch size with the highest speed on a mesh."""
        shards = len(devices) // tensor
        mesh = {"mesh.data": 1, "mesh.fsdp": shards, "mesh.tensor": tensor, "model.remat": remat}
        rows = start = max(rows // shards, 1) * shards
        speed = lambda rows: attempt(mesh | {"data.batch_size": rows, "accum": 1})
        while not (rate := speed(rows)) and rows >= 2 * shards:
            rows = rows // shards // 2 * shards
        faster = bool(rate) and rows == start
        while faster:
            doubled = speed(2 * rows)
            if faster := doubled > 1.02 * rate:
                rows, rate = 2 * rows, doubled
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
    rows += [("parameters", f"{d['parameters']:,}, of which {d['trained']:,} are trained")]
    rows += [(f"{kind.replace('_', ' ')} per device", size(n)) for kind, n in p["bytes"].items()]
    if not p["fits"]:
        return cli.table([*rows, ("fits", f"no: {p['verdict']}"), ("to make it fit", p["turn"])])
    rows += [("fits", f"yes: {p['verdict']}")]
    rows += [("large array", f"{size(n)} {shape} of {source}") for n, shape, source in p["largest"]]
    for axis, kinds in p["sent"].items():
        text = ", ".join(f"{kind} {size(n)}" for kind, n in sorted(kinds.items()))
        rows += [(f"sent over {axis}", f"{text} per device and step")]
    rows += [("FLOPs per step", f"{p['flops_per_step']:.4g}, with recomputation {p['flops_with_recomputation']:.4g}")]
    rows += [(f"time for {name}", span(t, ",.4f") + " s") for name, t in p.get("seconds_by", {}).items()]
    rows += [("time per step", span(p.get("seconds"), ",.4f") + " s"), ("tokens/s", span(p.get("tokens_per_second")))]
    rows += [("MFU", span(p.get("mfu"), ".1%") + " for this range of times")]
    rows += [(f"whole run: {name.replace('_', ' ')}", span(v, ",.1f")) for name, v in p.get("run", {}).items()]
    cli.table(rows)
    print(*p["assumed"], sep="\n")


def rank(found: list[Json]) -> None:
    """Prints the plans that fit into memory, the fastest first."""
    keys = lambda p: " ".join(f"--config.{k}={v}" for k, v in p["changes"].items())
    line = lambda p: (f"{span(p['tokens_per_second'])} tokens/s", f"peak {size(p['bytes']['peak'])}", keys(p))
    cli.table([line(p) for p in found] or [("nothing fits",)])


def axes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{a} {n}" for a, n in mesh.items() if n > 1) or "one"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
