"""What kernels cost on a GPU that is here, or on an H100 that is not: its PTX assembled by ptxas, which counts.

Registers and spills are those of the program that has most of them, shared memory that of the one that asks for most.
Bytes are what operations read and write, each once: what the programs of a kernel read again, the rows of x, they find
in the level-2 cache. Of the time on an absent GPU nothing is known: ptxas lists no schedule.
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

from common import chips
from common.errors import UserError
from common.types import Json
from model.weights import Tree

if TYPE_CHECKING:
    import jax

    from tools.kernel_report.cases import Case

COLD = 128 * 2**20  # bytes of operands, more than twice what a level-2 cache holds: an H100's is 50 MiB
CALLS = 16  # the most in a program that is timed, since each of them is compiled
ROUNDS = 7


def report(cases: list["Case"], dump: str, here: bool) -> list[Json]:
    """A row for each case: on the GPU that is `here`, timed, or on an absent H100. Raises UserError without either."""
    from tools.plan import topology

    flags = f" --xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
    device = present() if here else topology.devices("h100:1")[0]
    return [row(case, device, dump, here) for case in cases]


def present() -> "jax.Device":
    """The first GPU of this machine. Raises UserError where JAX finds none."""
    import jax

    try:
        return jax.devices("cuda")[0]
    except RuntimeError as e:
        raise UserError(
            f"JAX finds no GPU: {str(e).splitlines()[0]}", "--chip", "h100 compiles for an absent one"
        ) from e


def row(case: "Case", device: "jax.Device", dump: str, here: bool) -> Json:
    import jax

    chip = chips.find(device.device_kind)
    least = size(case.args) + size(jax.eval_shape(case.xla, *case.args))
    rates = {"bfloat16": 1, "int8": 2, "float8_e4m3fn": 2}  # of a tensor core, by what it multiplies
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


def size(tree: Tree) -> int:
    import jax

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def drawn(args: tuple, seed: int) -> "list[jax.Array]":
    """Operands of a case: random ones of its shapes, and its own where it has values."""
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
    """That a call of `f` takes among others, its operands in memory: the calls of a program have each their own."""
    import jax

    calls = [drawn(args, i) for i in range(min(math.ceil(COLD / size(args)), CALLS))]
    program = jax.jit(lambda calls: [f(*args) for args in calls]).lower(calls).compile()
    jax.block_until_ready(program(calls))
    took, runs = [], 10
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(runs):
            out = program(calls)
        jax.block_until_ready(out)
        took.append((time.perf_counter() - start) / (runs * len(calls)))
    return statistics.median(took)


def distance(ours: "jax.Array", theirs: "jax.Array") -> float:
    """The norm of the difference over that of `theirs`."""
    import jax.numpy as jnp

    ours, theirs = (x.astype(jnp.float32) for x in (ours, theirs))
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


def compiled(f: Callable, args: tuple, device: "jax.Device", dump: str) -> Json:
    """Figures of a function of abstract arrays, compiled for a device."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from tools.plan import hlo
    from train import mesh as meshes

    shutil.rmtree(dump)  # XLA makes it again
    mesh = meshes.make_mesh({}, [device])
    there = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())) for a in args]
    with jax.set_mesh(mesh):  # Pallas asks it what it compiles for
        program = jax.jit(f).lower(*there).compile()
    told = "".join(assembled(path) for path in glob.glob(f"{dump}/*.ptx"))
    shared = "".join(Path(p).read_text() for p in glob.glob(f"{dump}/*.thunk_sequence.txt"))
    most = lambda pattern, text: max(map(int, re.findall(pattern, text)), default=None)
    return {
        "registers": most(r"Used (\d+) registers", told),
        "spill_stores": most(r"(\d+) bytes spill stores", told),
        "spill_loads": most(r"(\d+) bytes spill loads", told),
        "shared": most(r"shared_memory: (\d+) bytes", shared),
        "bytes_moved": int(hlo.Program(program.as_text(), 1).traffic()),
        "bytes_temporary": program.memory_analysis().temp_size_in_bytes,
    }


def assembled(path: str) -> str:
    """What ptxas says of the programs in a file; one without any it does not take."""
    text = Path(path).read_text()
    if ".entry" not in text:
        return ""
    arch = re.search(r"\.target (\w+)", text)[1]
    argv = [ptxas(), "-v", f"-arch={arch}", path, "-o", os.devnull]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stderr


def ptxas() -> str:
    """The assembler of the CUDA wheels, whose folder has the version in its name, or that of the machine."""
    nvidia = importlib.util.find_spec("nvidia")
    found = (
        [p for folder in nvidia.submodule_search_locations for p in glob.glob(f"{folder}/*/bin/ptxas")]
        if nvidia
        else []
    )
    return found[0] if found else shutil.which("ptxas") or "ptxas"


def show(rows: list[Json]) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    heads = ("", "by", "registers", "spills", "shared", "bytes", "temporary", "us", "limit us", "off by")
    what = "spills: bytes stored and loaded. bytes: moved, over the least. limit: of the least bytes, or of the FLOPs"
    table = Table(*heads, title=f"{rows[0]['chip']}. {what}")
    told = lambda value, form: "n/a" if value is None else form(value)
    for r in rows:
        for by in (by for by in ("kernel", "xla") if by in r):
            got, off = r[by], r.get("off_by") if by == "kernel" else None
            table.add_row(
                f"{r['case']} {r['shape']}", by, told(got["registers"], str),
                told(got["spill_stores"], lambda n, got=got: f"{n} / {got['spill_loads']}"),
                told(got["shared"], lambda n: f"{n / 2**10:.1f} KiB"), f"{got['bytes_moved'] / r['bytes_least']:.2f}",
                f"{got['bytes_temporary'] / 1e6:.2f} MB", told(got.get("us"), "{:.1f}".format),
                told(r["limit_us"], "{:.1f}".format), told(off, "{:.0e}".format),
            )  # fmt: skip
    Console(highlight=False, width=140).print(table)
