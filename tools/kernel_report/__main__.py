"""Estimates the cost of `kernels/` on TPUs that need not be present, from the schedules that libtpu compiles.

    python -m tools.kernel_report --chip=v5e,v5p,v6e,tpu7x [--shapes=quick|all] [--only=REGEX] [--json]
    python -m tools.kernel_report --chip=h100|gpu ...

For each shape, the command prints the instruction bundles and iterations of the hottest loop, the MXU utilization
(minimum cycles divided by scheduled cycles), the bytes moved relative to the minimum, the VMEM, and the spilled
registers. With --shapes=all, a second line describes the program that XLA compiles for the same operands. Times are
printed as ranges. The lower end is the time of the schedule or the time of the HBM traffic at peak bandwidth, whichever
is longer. For a kernel, the upper end adds the shorter of these two times for one block, since the first block cannot
be computed while it is being copied. For XLA's program, the upper end is XLA's own estimate. Stalls are not included,
so kernels whose times differ by less than about 10 % cannot be ranked. For TPU7x, the number of products per cycle is
estimated from the chip's published peak rate, but compiled schedules contain more products per cycle than that. For
TPUs, the command needs requirements/tpu.txt.

`--chip=h100` compiles for an H100 that need not be present. It needs requirements/gpu.txt, and prints registers,
spills, memory and bytes, but no times. `--chip=gpu` prints the same for the GPU of this machine, measures times, and
compares the kernels' results with those of XLA's programs.
"""

import glob
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import chips, cli
from common.errors import UserError
from common.types import Json
from tools.kernel_report import gpu as kernel_report_gpu

if TYPE_CHECKING:
    import jax

    from tools.kernel_report.cases import Case


class Tpu(NamedTuple):
    """A TPU device, as libtpu defines it. A v5p chip is one device with two cores, whereas a TPU7x chip is two
    devices."""

    topology: str
    flops: dict[str, int]  # FLOPs per cycle by dtype: number of MXUs times FLOPs of one MXU
    devices: int = 1  # devices per chip


# An MXU of v5e or v5p computes 16 x 128 x 128 products in 16 cycles.
# An MXU of v6e or TPU7x computes 16 x 256 x 256 products in 8 cycles. TPU7x does not support int8.
TPUS = {
    "v5e": Tpu("v5e:2x2", {"bfloat16": 2**17, "int8": 2**18}),
    "v5p": Tpu("v5p:2x2x1", {"bfloat16": 2**18, "int8": 2**19}),
    "v6e": Tpu("v6e:2x2", {"bfloat16": 2**19, "int8": 2**20}),
    "tpu7x": Tpu("tpu7x:2x2x1", {"bfloat16": 2**19, "float8_e4m3fn": 2**20}, 2),
}
GPUS = ("h100", "gpu")  # "h100" need not be present; "gpu" is the GPU of this machine


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.kernel_report", __doc__)
    parser.add_argument("--chip", default=",".join(TPUS))
    parser.add_argument("--shapes", choices=("quick", "all"), default="all")
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = report(args.chip.split(","), args.shapes == "quick", args.only)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)


def report(names: list[str], quick: bool, only: str) -> list[Json]:
    """Returns one row per chip and case. Raises UserError if a chip is unknown or its compiler is not installed."""
    from tools.kernel_report.cases import cases
    from tools.plan import topology

    if unknown := [n for n in names if n not in (*TPUS, *GPUS)]:
        raise UserError(f"unknown chip {unknown[0]!r}", "--chip", "one or more of " + ", ".join((*TPUS, *GPUS)))
    gpu = next((n for n in names if n in GPUS), "")
    if gpu and len(names) > 1:
        raise UserError("one process can load only one compiler", "--chip", f"give only {gpu}")
    chosen = [c for c in cases() if (c.quick or not quick) and re.search(only, f"{c.name} {c.shape}")]
    on = {p: [c for c in chosen if c.platform == p] for p in ("tpu", "cuda")}
    on["tpu"] = [c._replace(xla=None) if quick and c.kernel else c for c in on["tpu"]]
    with tempfile.TemporaryDirectory() as dump:
        # libtpu reads these options only when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
            " --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
        devices = {name: topology.devices(TPUS[name].topology)[0] for name in names if name in TPUS}
        rows = [row(case, name, device, dump) for name, device in devices.items() for case in on["tpu"]]
        return rows + (kernel_report_gpu.report(on["cuda"], dump, gpu == "gpu") if gpu else [])


def row(case: "Case", name: str, device: "jax.Device", dump: str) -> Json:
    """Returns the figures of one case on one chip."""
    import jax

    tpu, chip = TPUS[name], chips.find(name)
    peak = tpu.flops.get(case.peak)
    hertz = chip.tflops.value / tpu.devices * 1e12 / tpu.flops["bfloat16"]
    bandwidth = chip.hbm_bandwidth.value / tpu.devices
    size = kernel_report_gpu.size
    least = size(case.args) + size(jax.eval_shape(case.kernel or case.xla, *case.args))
    found: Json = {"chip": name, "case": case.name, "shape": case.shape, "bytes_least": least}
    for by, f in (("kernel", case.kernel), ("xla", case.xla)):
        if f is None:
            continue
        got = compiled(f, case.args, device, dump)
        mxu = case.flops / peak if peak else None
        cycles = max(got["cycles"], mxu or 0)  # the schedule may be up to 10 % shorter, since the MXU queues products
        busy, estimated = cycles / hertz, got.pop("estimated") / hertz
        hbm = (got["bytes_moved"] if by == "kernel" else least) / bandwidth
        low = max(busy, hbm)
        high = low + min(busy, hbm) / got["steps"] if by == "kernel" else max(low, estimated)
        found[by] = got | {
            "mxu_cycles": mxu, "utilization": mxu / cycles if mxu else None,
            "compute_us": busy * 1e6, "hbm_us": hbm * 1e6, "us": [low * 1e6, high * 1e6],
        }  # fmt: skip
    return found


def compiled(f: Callable, args: tuple, device: "jax.Device", dump: str) -> Json:
    """Compiles a function for a device, given abstract arguments, and returns statistics of the program."""
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    from tools.kernel_report import schedule

    for old in glob.glob(f"{dump}/*"):
        os.unlink(old)
    one = SingleDeviceSharding(device)
    here = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one) for a in args]
    grids = list(calls(jax.make_jaxpr(f)(*args).jaxpr))
    # With this layout, the kernel's output is not converted. A larger program would not contain that conversion either.
    program = jax.jit(f, out_shardings=Format(Layout((0, 1)), one) if grids else None).lower(*here).compile()
    sums = grids[0].grid[-1] if grids else math.inf
    listings = sorted(glob.glob(f"{dump}/*final_bundles.txt"))
    listings = [p for p in listings if not re.search("schedule-analysis|<late|-TLP-", p)]
    parts = [schedule.read(Path(p).read_text(errors="replace"), sums) for p in listings]
    hot = max(parts, key=lambda p: (p.products * p.turns, p.hot * p.turns))
    text, memory = program.as_text(), program.memory_analysis()
    vmem = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    return {
        "cycles": sum(p.cycles for p in parts),
        "turns_known": all(p.known for p in parts),
        "bundles": hot.hot, "turns": hot.turns, "spills": hot.spills,
        "steps": math.prod(grids[0].grid) if grids else 1,
        "bytes_moved": sum(map(moved, grids)) + copied(text) if grids else None,
        "bytes_temporary": memory.temp_size_in_bytes,
        "vmem": max(map(int, re.findall(vmem, text)), default=0),
        "estimated": sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))),
    }  # fmt: skip


def calls(jaxpr: "jax.extend.core.Jaxpr") -> Iterator[Any]:
    """Yields the grids of the Pallas calls in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["grid_mapping"]
        for inner in eqn.params.values():
            inner = getattr(inner, "jaxpr", inner)
            yield from calls(inner) if hasattr(inner, "eqns") else ()


def moved(grid: Any) -> int:
    """Returns the bytes moved between HBM and VMEM. A block is moved if its index changes from one grid step to the
    next."""
    import jax
    import jax.extend.core
    import numpy as np

    steps = np.indices(grid.grid).reshape(len(grid.grid), -1)
    total = 0
    for block in grid.block_mappings:
        index = jax.vmap(jax.extend.core.jaxpr_as_fun(block.index_map_jaxpr))
        at = np.stack(index(*steps.astype(np.int32)), -1)
        at = at[np.append(True, (at[1:] != at[:-1]).any(-1))]
        shape = np.array(block.array_aval.shape)
        tile = np.array([getattr(b, "block_size", b) for b in block.block_shape])
        total += np.minimum(tile, shape - at * tile).prod(-1).sum() * block.array_aval.dtype.itemsize
    return int(total)


def copied(text: str) -> int:
    """Returns the bytes that XLA reads and writes around a kernel to change the layout of operands."""
    shapes = re.findall(r"= (\w+?)(\d+)\[([\d,]+)\]\S* (?:copy|pad|fusion|transpose)\(", text)
    return sum(2 * int(bits) // 8 * math.prod(map(int, dims.split(","))) for _, bits, dims in shapes)


def show(rows: list[Json]) -> None:
    """Prints one table per chip."""
    if gpu := [r for r in rows if r["chip"] not in TPUS]:
        kernel_report_gpu.show(gpu)
    heads = ("", "by", "bundles", "MXU", "us", "HBM us", "bytes", "VMEM", "spills")
    for name in dict.fromkeys(r["chip"] for r in rows if r["chip"] in TPUS):
        cells = []
        for r in (r for r in rows if r["chip"] == name):
            for by in ("kernel", "xla"):
                if by in r:
                    cells.append([f"{r['case']} {r['shape']}", by, *line(r[by], r["bytes_least"], by == "kernel")])
        cli.table(cells, heads, f"{name}. MXU: utilization. bytes: bytes moved, divided by the minimum", width=120)


def line(got: Json, least: int, exact: bool) -> list[str]:
    """Returns the cells of one row. The bytes of XLA's programs are n/a, since XLA does not report which bytes leave
    VMEM."""
    low, high = (f"{t:.1f}" for t in got["us"])
    return [
        f"{got['bundles']} x {got['turns']}" + ("" if got["turns_known"] else " ?"),
        "n/a" if got["utilization"] is None else f"{got['utilization']:.2f}",
        low if low == high else f"{low}-{high}",
        f"{got['hbm_us']:.1f}",
        f"{got['bytes_moved'] / least:.2f}" if exact else "n/a",
        f"{got['vmem'] / 2**20:.1f} MiB",
        str(got["spills"]),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
