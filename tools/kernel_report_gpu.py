"""What kernels cost on an H100 that is not here: compiled by XLA on this CPU, its PTX assembled by ptxas, which counts.

Registers and spills are those of the program that has most of them, shared memory that of the one that asks for most.
Bytes are what operations read and write, each once: what the programs of a kernel read again, the rows of x, they find
in the level-2 cache. Of the time nothing is known: ptxas lists no schedule.
"""

import glob
import importlib.util
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any


def report(cases: list[Any], dump: str) -> list[dict[str, Any]]:
    """A row for each case. Raises UserError without the CUDA wheels."""
    from tools.plan import topology

    flags = f" --xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
    device = topology("h100:1")[0]
    return [row(case, device, dump) for case in cases]


def row(case: Any, device: Any, dump: str) -> dict[str, Any]:
    import jax

    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    least = size(case.args) + size(jax.eval_shape(case.xla, *case.args))
    found = {"chip": "h100", "case": case.name, "shape": case.shape, "bytes_least": least}
    by = {"kernel": case.kernel, "xla": case.xla}
    return found | {k: compiled(f, case.args, device, dump) for k, f in by.items() if f is not None}


def compiled(f: Any, args: tuple, device: Any, dump: str) -> dict[str, Any]:
    """Figures of a function of abstract arrays, compiled for a device."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from tools import plan_hlo
    from train import mesh as meshes

    for old in glob.glob(f"{dump}/*"):
        os.unlink(old)
    mesh = meshes.make_mesh({}, [device])
    here = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P())) for a in args]
    with jax.set_mesh(mesh):  # Pallas asks it what it compiles for
        program = jax.jit(f).lower(*here).compile()
    told = "".join(assembled(path) for path in glob.glob(f"{dump}/*.ptx"))
    shared = "".join(Path(p).read_text() for p in glob.glob(f"{dump}/*.thunk_sequence.txt"))
    most = lambda pattern, text: max(map(int, re.findall(pattern, text)), default=None)
    return {
        "registers": most(r"Used (\d+) registers", told),
        "spill_stores": most(r"(\d+) bytes spill stores", told),
        "spill_loads": most(r"(\d+) bytes spill loads", told),
        "shared": most(r"shared_memory: (\d+) bytes", shared),
        "bytes_moved": int(plan_hlo.Program(program.as_text(), 1).traffic()),
        "bytes_temporary": program.memory_analysis().temp_size_in_bytes,
    }


def assembled(path: str) -> str:
    """What ptxas says of the programs in a file; one without any it does not take."""
    text = Path(path).read_text()
    if ".entry" not in text:
        return ""
    (nvidia,) = importlib.util.find_spec("nvidia").submodule_search_locations
    arch = re.search(r"\.target (\w+)", text)[1]
    argv = [f"{nvidia}/cuda_nvcc/bin/ptxas", "-v", f"-arch={arch}", path, "-o", os.devnull]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stderr


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table."""
    from rich.console import Console
    from rich.table import Table

    heads = ("", "by", "registers", "spills", "shared", "bytes", "temporary", "us")
    table = Table(*heads, title="h100. spills: bytes stored and loaded. bytes: moved, over the least")
    told = lambda value, form: "n/a" if value is None else form(value)
    for r in rows:
        for by in (by for by in ("kernel", "xla") if by in r):
            got = r[by]
            table.add_row(
                f"{r['case']} {r['shape']}", by, told(got["registers"], str),
                told(got["spill_stores"], lambda n, got=got: f"{n} / {got['spill_loads']}"),
                told(got["shared"], lambda n: f"{n / 2**10:.1f} KiB"), f"{got['bytes_moved'] / r['bytes_least']:.2f}",
                f"{got['bytes_temporary'] / 1e6:.2f} MB", "n/a",
            )  # fmt: skip
    Console(highlight=False, width=120).print(table)
