"""Measures speed and memory of training and decoding on this machine, compared with torch and llama.cpp.

    python -m tools.bench [--what=train,sft,decode,small,adapters,methods,ask] [--rounds=3] [--out=runs/bench.json]

The implementations (this code, torch, llama.cpp) run in separate processes and take turns, so that a slow minute of the
machine affects all of them. Every turn gives the ratio of this project's speed to that of each other implementation.
The median of these ratios is printed. All measurements and a description of the machine are written to --out.

On a GPU, all processes share its memory, so set the environment variables JAX_PLATFORMS=cuda
XLA_PYTHON_CLIENT_PREALLOCATE=false, and use the options --model=llama2-7b --dtype=bfloat16. The reported memory is then
GPU memory.
"""

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import chips, cli, files
from common.errors import UserError
from common.packages import PACKAGES, packaged
from common.types import Json
from configs.models import SHAPES
from configs.schema.methods import FOLDERS, method, names
from tools.bench.worker import Worker

OURS, PEERS = "tools.bench.ours", "tools.bench.peers"
TORCH = ("torch", "transformers", "peft", "trl")
DECODE = dict(what="decode", prompt=64, new_tokens=48)
VERSIONS = ("jax", "jaxlib", *TORCH, "xllamacpp", "lm_eval")


class Side(NamedTuple):
    name: str
    module: str
    case: dict


class Contest(NamedTuple):
    title: str
    sides: list[Side]  # the first one is compared with each of the others


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.bench", __doc__)
    parser.add_argument("--what", default=",".join(WHAT), help="benchmarks to run: " + ",".join(WHAT))
    parser.add_argument("--rounds", type=int, default=3, help="turns per side")
    parser.add_argument("--out", default="runs/bench.json")
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="a packaged model, a folder, or a shape, which gets random weights",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="for this project; others use float32"
    )
    parser.add_argument(
        "--data", default="", help="a JSON Lines file of prompts and completions (default: questions about Python)"
    )
    parser.add_argument("--alone", action="store_true", help="do not run other libraries, even if they are installed")
    args = parser.parse_args(argv)
    if unknown := set(args.what.split(",")) - set(WHAT):
        raise UserError(f"unknown {min(unknown)!r}", "--what", f"one or more of {','.join(WHAT)}")
    bench(args)


def bench(args: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    alone = args.alone or args.model in SHAPES  # a mere shape has no weights to load elsewhere
    missing = [] if alone else [name for name in TORCH if not importlib.util.find_spec(name)]
    if missing:
        console.print(f"{', '.join(missing)} not installed: only this project is measured")
    facts, results = {"load_before": os.getloadavg(), **machine()}, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = Path(args.data or folder / "questions.jsonl").absolute()
        if not args.data:
            files.write_lines(data, questions())
        peers = "" if alone or missing else exported(args.model, folder / "model")
        for what in args.what.split(","):
            for contest in WHAT[what](args.model, peers, str(data)):
                results.append(measure(contest, args.rounds, args.dtype))
                console.print(table(results[-1]))
    facts["load_after"] = os.getloadavg()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": ["python", "-m", "tools.bench", *sys.argv[1:]], "machine": facts, "contests": results}
    files.write_json(out, files.plain(content))
    chips = ", ".join((*facts["gpu"], facts["cpu"]))
    console.print(f"{chips}, {facts['cores']} cores, load {facts['load_before'][0]:.1f} · {out}", soft_wrap=True)


# --- contests ---


def training(model: str, peers: str, _: str) -> Iterator[Contest]:
    """Compares the speed of training steps on equal batches: this project with torch, and LoRA with full
    fine-tuning."""
    sides = {}
    for kind, peft in {"full": "", "LoRA": "lora"}.items():
        case = dict(what="train", peft=peft, batch=4, length=256, steps=2)
        sides[kind] = Side(f"ours, {kind}", OURS, case | {"model": model})
        peer = Side("torch + PEFT, LoRA" if kind == "LoRA" else "torch, full", PEERS, case | {"model": peers})
        yield Contest(f"{kind} training steps, 4 rows of 256 tokens", [sides[kind], *([peer] if peers else [])])
    yield Contest("LoRA and full fine-tuning, 4 rows of 256 tokens", [sides["LoRA"], sides["full"]])


def tuning(model: str, peers: str, data: str) -> Iterator[Contest]:
    """Compares the speed of LoRA fine-tuning on instruction data, with each library used as its documentation
    recommends. TRL runs twice: with packed rows, and with its default batch of 8 padded rows."""
    case = dict(what="sft", data=data, length=256, steps=6)
    sides = [Side("ours, packed", OURS, case | dict(model=model, batch=4))]
    if peers:
        sides += [
            Side("TRL, packed", PEERS, case | dict(model=peers, batch=4, packing=True)),
            Side("TRL, padded, 8 rows", PEERS, case | dict(model=peers, batch=8, packing=False)),
        ]
    yield Contest("LoRA fine-tuning on instructions, without padding tokens", sides)


def decoding(model: str, peers: str, _: str) -> Iterator[Contest]:
    """Compares the speed of greedy decoding, without the time for the prompt."""
    for batch in (1, 8):
        sides = [Side("ours", OURS, DECODE | dict(model=model, batch=batch))]
        if peers:
            sides.append(Side("transformers", PEERS, DECODE | dict(model=peers, batch=batch)))
        yield Contest(f"decoding, batch {batch}", sides + llama_cpp(model, peers, batch))


def llama_cpp(model: str, peers: str, batch: int) -> list[Side]:
    """Returns a decoding benchmark of llama.cpp for batches of one row, if llama.cpp is installed and can read the
    model's file."""
    if batch > 1 or not (peers and model in PACKAGES and importlib.util.find_spec("xllamacpp")):
        return []
    return [Side("llama.cpp, quantized", PEERS, DECODE | dict(what="llama_cpp", gguf=str(packaged(model))))]


def small(model: str, peers: str, _: str) -> Iterator[Contest]:
    """Compares the speed of decoding with a model's 8-bit, 4-bit and original weights."""
    formats = {"int8": dict(name="int8"), "w8a8": dict(name="int8", activations=True), "int4": dict(name="int4")}
    for batch in (1, 8):
        case = DECODE | dict(model=model, batch=batch)
        sides = [Side(f"ours, {name}", OURS, case | {"quant": quant}) for name, quant in formats.items()]
        sides.append(Side("ours, not quantized", OURS, case))
        yield Contest(f"decoding with quantized weights, batch {batch}", sides + llama_cpp(model, peers, batch))


def adapting(model: str, peers: str, _: str) -> Iterator[Contest]:
    """Compares the speed of decoding with a separate adapter for each row, with one adapter for all rows, and without
    adapters.

    PEFT keeps all adapters in the model, so PEFT runs with 8 adapters, one per row, instead of 1,000.
    """

    def case(model: str, n: int) -> Json:
        ranks = [8 + 13 * i % 57 for i in range(n)] if n > 1 else [36]  # ranks from 8 to 64 in scattered order
        return DECODE | dict(what="adapters", model=model, batch=8, ranks=ranks)

    sides = [Side(f"ours, {n} adapters" if n > 1 else "ours, 1 adapter", OURS, case(model, n)) for n in (1000, 8, 1)]
    sides.append(Side("ours, none", OURS, DECODE | dict(model=model, batch=8)))
    if peers:
        sides.append(Side("PEFT, 8 adapters", PEERS, case(peers, 8)))
    yield Contest("decoding 8 rows, adapters of ranks 8 to 64", sides)


def asking(model: str, peers: str, data: str) -> Iterator[Contest]:
    """Compares the speed of answering questions that all follow the same 12 solved examples. The examples are processed
    only once, or again for every question."""
    case = dict(what="ask", data=data, questions=100, shots=12, new_tokens=16, rows=16)
    ours = case | {"model": model}
    sides = [Side("ours", OURS, ours | {"shared": True}), Side("ours, not shared", OURS, ours | {"shared": False})]
    if peers and importlib.util.find_spec("lm_eval"):
        sides.append(Side("lm-evaluation-harness", PEERS, case | dict(what="lm_eval", model=peers)))
    yield Contest("100 questions after the same 12 examples, prompt tokens", sides)


def methods(model: str, peers: str, _: str) -> Iterator[Contest]:
    """Compares the speed of training by each PEFT method and by full fine-tuning, and the speed of decoding with
    unmerged adapters and with the base model.

    Every method uses its default arguments.
    """
    free = lambda name: not any(key.required for key in method("peft", name).arguments.values())
    found = [name for name in names(FOLDERS["peft"], "make") if free(name)]
    case = dict(what="train", batch=2, length=256, steps=2, model=model)
    sides = [Side(name or "full", OURS, case | {"peft": name}) for name in ("", *found)]
    yield Contest("training steps, 2 rows of 256 tokens", sides)
    case = DECODE | dict(model=model, batch=8)
    sides = [Side("none", OURS, case), Side("lora, merged", OURS, case | dict(peft="lora", merged=True))]
    sides += [Side(name, OURS, case | {"peft": name}) for name in found]
    yield Contest("decoding 8 rows with an adapter", sides)


WHAT = {
    "train": training,
    "sft": tuning,
    "decode": decoding,
    "small": small,
    "adapters": adapting,
    "methods": methods,
    "ask": asking,
}


def questions(limit: int = 1000) -> list[dict[str, str]]:
    """Makes instruction data from the docstrings of the standard library's functions, which every machine has."""
    out = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (answer := ast.get_docstring(node)):
                prompt = f"What does the function {node.name} of Python's module {path.stem} do?\n"
                out.append({"prompt": prompt, "completion": answer})
    return out[:: max(1, len(out) // limit)]


def exported(model: str, folder: Path) -> str:
    """Exports a packaged model to a folder for transformers, in a process that ends before anything is timed."""
    if model not in PACKAGES:
        return model
    export = [sys.executable, "-m", "tools.export", f"--from={model}", f"--to={folder}"]
    done = subprocess.run(export, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", **os.environ})
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1], model)
    return str(folder)


# --- measurements ---


def measure(contest: Contest, rounds: int, dtype: str) -> Json:
    """Runs `rounds` rounds, in each of which every side runs once. Computes the ratios of the first side's results to
    those of each side. Sides that run this project's code compute in `dtype`."""
    cases = [side.case | {"dtype": dtype} if side.module == OURS else side.case for side in contest.sides]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(side.module, case)) for side, case in zip(contest.sides, cases)]
        turns = [[worker.round() for worker in workers] for _ in range(rounds)]
        peaks = [worker.peak_bytes() for worker in workers]
    sides = []
    for i, side in enumerate(contest.sides):
        pairs = [(turn[0], turn[i]) for turn in turns]
        rate = lambda r: r["tokens"] / r["seconds"]
        cost = lambda r: r["cpu_seconds"] / r["tokens"] if r["cpu_seconds"] else float("nan")
        sides.append({
            "name": side.name,
            "case": cases[i],
            "rounds": [turn[i] for turn in turns],
            "tokens_per_second": statistics.median(rate(theirs) for _, theirs in pairs),
            "cpu_seconds_per_token": _number(statistics.median(cost(theirs) for _, theirs in pairs)),
            "peak_bytes": peaks[i],
            "ratio": {
                "tokens_per_second": statistics.median(rate(ours) / rate(theirs) for ours, theirs in pairs),
                "per_cpu_second": _number(statistics.median(cost(theirs) / cost(ours) for ours, theirs in pairs)),
                "peak_bytes": peaks[0] / peaks[i],
            },
        })  # fmt: skip
    return {"title": contest.title, "sides": sides}


def _number(x: float) -> float | None:
    return None if x != x else x


def table(result: Json) -> Any:
    """Formats the results of one contest as a table of the package rich. The ratio in a row is the value of the first
    row divided by the value of that row."""
    from rich.table import Table

    out = Table(title=result["title"], title_justify="left")
    for column in ("", "tokens/s", "CPU ms/token", "peak GB", "ratio: tokens/s", "per CPU s", "memory"):
        out.add_column(column, justify="right" if column else "left")
    show = lambda x, digits=2: "n/a" if x is None else f"{x:.{digits}f}"
    for side in result["sides"]:
        cpu, ratio = side["cpu_seconds_per_token"], side["ratio"]
        out.add_row(
            side["name"], show(side["tokens_per_second"], 1), show(cpu and 1e3 * cpu), show(side["peak_bytes"] / 1e9),
            show(ratio["tokens_per_second"]), show(ratio["per_cpu_second"]), show(ratio["peak_bytes"]),
        )  # fmt: skip
    if result["title"] == "decoding, batch 1" and not any("llama" in side["name"] for side in result["sides"]):
        out.caption = "llama.cpp n/a (xllamacpp not installed)"
    return out


def machine() -> Json:
    """Describes the hardware and software on which the figures depend."""
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": chips.processor(),
        "gpu": boards(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def boards() -> list[str]:
    """Returns the name and driver version of each NVIDIA GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    return []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
