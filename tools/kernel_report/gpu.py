"""Reports the cost of kernels on the GPU of this machine, or on an H100 that is not present, from the statistics that
ptxas prints.

Registers, spills and shared memory are the maxima over all GPU programs of a case. In the bytes moved, every operand
and every result is counted once: a kernel reads the rows of x repeatedly, but from the L2 cache. For a GPU that is not
present, times are not known, since ptxas prints no schedule.
"""

import glob
import importlib.util
import math
import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import chips, cli
from common.errors import UserError
from common.types import Json

if TYPE_CHECKING:
    import jax

    from model.weights import Tree
    from tools.kernel_report.cases import Case

COLD = 128 * 2**20  # bytes of the operands of all timed calls: more than twice the L2 cache of an H100
CALLS = 16  # maximum number of calls in a timed program, which is limited since each call is compiled
ROUNDS = 7


def report(cases: list["Case"], dump: str, here: bool) -> list[Json]:
    """Returns one row per case, timed on the GPU of this machine if `here`, or otherwise compiled for an H100 that is
    not present. Raises UserError if `here` and JAX finds no GPU."""
    from tools.plan import topology

    flags = f" --xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
    device = present() if here else topology.devices("h100:1")[0]
    return [row(case, device, dump, here) for case in cases]


def present() -> "jax.Device":
    """Returns the first GPU of this machine. Raises UserError if JAX finds no GPU."""
    import jax

    try:
        return jax.devices("cuda")[0]
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"JAX finds no GPU: {reason}", "--chip", "--chip=h100 does not need one") from e


def row(case: "Case", device: "jax.Device", dump: str, here: bool) -> Json:
    import jax

    chip = chips.find(device.device_kind)
    least = size(case.args) + size(jax.eval_shape(case.xla, *case.args))
    rates = {"bfloat16": 1, "int8": 2, "float8_e4m3fn": 2}  # relative rates of a tensor core, by dtype
    times = [least / chip.hbm_bandwidth.value] if chip else []
    times += [case.flops / (chip.tflops.value * 1e12 * rates[case.peak])] if chip and case.flops else []
    found = {"chip": device.device_kind, "case": case.name, "shape": case.shape, "bytes_least": least}
    found["limit_us"] = max(times) * 1e6 if times else None
    by = {k: f for k, f in (("kernel", case.kernel), ("xla", case.xla)) if f is not None}
    found |= {k: compiled(f, case.args, device, dump) for k, f in by.items()}
    if here:
        for k, f in by.items():
            found[k]["us"] = 1e6 * seconds(f, case.args)
        if case.kernel:
            one = drawn(case.args, 0)
            found["off_by"] = distance(jax.jit(case.kernel)(*one), jax.jit(case.xla)(*one))
    return found


def size(tree: "Tree") -> int:
    import jax

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def drawn(args: tuple, seed: int) -> "list[jax.Array]":
    """Returns the operands of a case: its concrete arrays, and random arrays in place of its abstract arrays."""
    import jax
    import jax.numpy as jnp

    def one(a: Any, key: jax.Array) -> jax.Array:
        if not isinstance(a, jax.ShapeDtypeStruct):
            return jnp.asarray(a)
        if jnp.issubdtype(a.dtype, jnp.floating):
            return jax.random.normal(key, a.shape).astype(a.dtype)
        return jax.lax.bitcast_convert_type(jax.random.bits(key, a.shape, f"uint{8 * a.dtype.itemsize}"), a.dtype)

    return [one(a, key) for a, key in zip(args, jax.random.split(jax.random.key(seed), len(args)), strict=True)]


def seconds(f: Callable, args: tuple) -> float:
    """Returns the seconds per call of `f`. Every call in the timed program has its own operands, so that they are read
    from HBM instead of a cache."""
    import jax

    calls = [drawn(args, i) for i in range(min(math.ceil(COLD / size(args)), CALLS))]
    program = jax.jit(lambda calls: [f(*args) for args in calls]).lower(calls).compile()
    jax.block_until_ready(program(calls))
    times, runs = [], 10
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(runs):
            out = program(calls)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / (runs * len(calls)))
    return statistics.median(times)


def distance(ours: "jax.Array", theirs: "jax.Array") -> float:
    """Returns the norm of the difference between the arrays, divided by the norm of `theirs`."""
    import jax.numpy as jnp

    ours, theirs = (x.astype(jnp.float32) for x in (ours, theirs))
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


def compiled(f: Callable, args: tuple, device: "jax.Device", dump: str) -> Json:
    """Compiles a function for a device, given abstract arguments, and returns statistics of the program."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from tools.plan import hlo
    from train import mesh as meshes

    shutil.rmtree(dump)  # XLA creates the folder again
    mesh = meshes.make_mesh({}, [device])
    there = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())) for a in args]
    with jax.set_mesh(mesh):  # Pallas compiles for the device of this mesh
        program = jax.jit(f).lower(*there).compile()
    counts = "".join(assembled(path) for path in glob.glob(f"{dump}/*.ptx"))
    shared = "".join(Path(p).read_text() for p in glob.glob(f"{dump}/*.thunk_sequence.txt"))
    most = lambda pattern, text: max(map(int, re.findall(pattern, text)), default=None)
    return {
        "registers": most(r"Used (\d+) registers", counts),
        "spill_stores": most(r"(\d+) bytes spill stores", counts),
        "spill_loads": most(r"(\d+) bytes spill loads", counts),
        "shared": most(r"shared_memory: (\d+) bytes", shared),
        "bytes_moved": int(hlo.Program(program.as_text(), 1).traffic()),
        "bytes_temporary": program.memory_analysis().temp_size_in_bytes,
    }


def assembled(path: str) -> str:
    """Returns the statistics that ptxas prints for a file. Returns "" if the file contains no programs, since ptxas
    rejects such a file."""
    text = Path(path).read_text()
    if ".entry" not in text:
        return ""
    arch = re.search(r"\.target (\w+)", text)[1]
    argv = [ptxas(), "-v", f"-arch={arch}", path, "-o", os.devnull]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stderr


def ptxas() -> str:
    """Returns the path of ptxas in the CUDA wheels, in which the name of one folder depends on the CUDA version. If the
    wheels do not contain ptxas, returns the path of the one on PATH."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else []
    found = [path for folder in folders for path in glob.glob(f"{folder}/*/bin/ptxas")]
    return found[0] if found else shutil.which("ptxas") or "ptxas"


def show(rows: list[Json]) -> None:
    """Prints a table."""
    heads = ("", "by", "registers", "spills", "shared", "bytes", "temporary", "us", "limit us", "off by")
    legend = "spills: bytes stored / loaded. bytes: divided by the minimum. limit: set by bytes or FLOPs"
    cells = []
    shown = lambda value, form: "n/a" if value is None else form(value)
    for r in rows:
        for by in (by for by in ("kernel", "xla") if by in r):
            got, off = r[by], r.get("off_by") if by == "kernel" else None
            cells.append([
                f"{r['case']} {r['shape']}", by, shown(got["registers"], str),
                shown(got["spill_stores"], lambda n, got=got: f"{n} / {got['spill_loads']}"),
                shown(got["shared"], lambda n: f"{n / 2**10:.1f} KiB"), f"{got['bytes_moved'] / r['bytes_least']:.2f}",
                f"{got['bytes_temporary'] / 1e6:.2f} MB", shown(got.get("us"), "{:.1f}".format),
                shown(r["limit_us"], "{:.1f}".format), shown(off, "{:.0e}".format),
            ])  # fmt: skip
    cli.table(cells, heads, f"{rows[0]['chip']}. {legend}", width=140)
