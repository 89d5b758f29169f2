"""Measures which method suits a task and at what cost: prompting, retrieval, LoRA, full fine-tuning, hosted models.

    python -m tools.compare --task=rows.csv [--models=A,B] [--documents=SOURCE] [--methods=zero_shot,lora] [--plan]
        --embedder=NAME    also find passages by their vectors, such as those of all-minilm-l6-v2
        --budget=30min     upper limit: time, dollars (2usd) or FLOPs (1e15); default: no limit;
                           "all" drops no setting before the last rung
        --rungs=3          rungs of successive halving; 0 only tests the first setting of every method
        --settings=2       maximum number of settings per method, such as learning rates; default: all
        --seeds=3          number of training runs per tested method, each with another seed
        --epochs=3         number of passes over the training rows in each training run
        --requests=10000   requests per month that the recommendation assumes
        --price=1:2:4      USD per hour of the machine that will answer requests: LOW:VALUE:HIGH or VALUE
        --chip=v5e         chip that will answer requests, a name in common/chips.json; default: this machine
        --plan             only estimates FLOPs, time, money and energy
        --emit=slurm       (or skypilot, xpk, gcloud, lines) only writes files that run the next training jobs
                           on a cluster
        --out=runs/compare

The task is a file of questions and answers. Options of evals.main can follow its name, as in rows.csv:scorer=number.
Each row is used for training, validation or testing, depending only on its question. Settings are chosen on validation
rows. The test rows are used once, at the end. Methods are files in tools/compare/methods. If the command is
interrupted, the same command resumes the comparison and makes the same choices.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from common import cli, exits
from common.errors import UserError, did_you_mean
from common.methods import known, module
from common.types import Json
from infer import hosted
from tools.compare import halving, plan
from tools.compare.engine import Engine
from tools.compare.inputs import Comparison, base, read
from tools.compare.method import Candidate, Method
from tools.compare.record import Record, resumed
from tools.sweep.emit import LINES

MODEL = "smollm2-135m-instruct"
ORDER = "zero_shot", "instruction", "few_shot", "rag", "lora", "qlora", "full", "rag_lora"


@cli.command
def main(argv: list[str]) -> int:
    args = options(argv)
    import jax

    jax.config.update("jax_platforms", "cpu")  # so that the jobs can use the accelerators
    machine = here()
    prices = plan.prices(machine, plan.price(args.price), args.chip)
    flops, seconds = plan.budget(args.budget, prices[-1]["usd_hour"] and prices[-1]["usd_hour"][1])
    task = read(args.task)
    bases = {name: base(name, task) for name in args.models}
    c = Comparison(task, bases, args.documents or None, args.epochs, args.out, args.embedder)
    found, refused = candidates(c, args.methods, args.settings)
    if not found:
        raise UserError(f"no method can be used: {refused[0]['why']}", "--methods")
    rungs = halving.rungs(args.rungs, len(task.scored["train"]), len(task.scored["validation"]))
    if args.plan:
        plan.show(c, found, rungs, args.seeds, plan.planned(prices), args.budget == plan.ALL)
        print(*(f"{row['label']} ({row['model']}) cannot be used: {row['why']}" for row in refused), sep="\n")
        return exits.DONE
    asked = Record(
        task=task.record(), models=args.models, documents=c.documents, requests=args.requests,
        seeds=list(range(args.seeds)), epochs=args.epochs, rungs=rungs, methods_asked=args.methods,
        budget={"asked": args.budget, "flops": flops, "rate": None, "rate_from": ""},
        machine=machine, prices=prices, candidates=[x.row() for x in found],
        methods=[*(_row(x.name, x.model, x.method, "open", "") for x in halving.first(found)), *refused],
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    from train.keep.runs import take_lock

    lock = take_lock(args.out / "LOCK")
    try:
        engine = Engine(c, resumed(asked, args.out), found, seconds)
        if not args.emit:
            return engine.run()
        print(*engine.emit(args.emit), sep="\n")
        return exits.DONE
    finally:
        os.close(lock)


def options(argv: list[str]) -> argparse.Namespace:
    """Parses and checks the options of a command line."""
    parser = cli.Parser("tools.compare", __doc__)
    parser.add_argument("--task", required=True)
    parser.add_argument("--models", default=[MODEL], type=cli.listed)
    parser.add_argument("--methods", default=names(), type=cli.listed)
    for name in ("documents", "embedder", "budget", "price", "chip"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--requests", default=10_000, type=float)
    parser.add_argument("--epochs", default=3.0, type=float)
    parser.add_argument("--seeds", default=3, type=cli.count)
    parser.add_argument("--rungs", default=3, type=cli.count)
    parser.add_argument("--settings", default=None, type=cli.count)
    parser.add_argument("--out", default="runs/compare", type=Path)
    parser.add_argument("--emit", default="", choices=("", *LINES, "slurm"))
    parser.add_argument("--plan", action="store_true")
    args = parser.parse_args(argv)
    for name in args.methods:
        if name not in names():
            raise UserError(f"no method {name!r}", "--methods", did_you_mean(name, names(), f"of {', '.join(names())}"))
    if 0 in (args.seeds, args.settings) or not (0 < args.requests < math.inf and 0 < args.epochs < math.inf):
        raise UserError("the values must be positive", "--seeds, --settings, --epochs and --requests")
    if args.embedder and not args.documents:
        raise UserError("an embedder needs documents", "--embedder", "give --documents=SOURCE")
    if args.budget and not args.rungs:
        raise UserError("a budget needs at least one rung of successive halving", "--rungs=0", "--rungs=1 or more")
    return args


def names() -> list[str]:
    """Returns the methods in the order in which they are tried. Methods that are not in ORDER come last."""
    found = known("tools.compare.methods")
    return [*(name for name in ORDER if name in found), *(name for name in found if name not in ORDER)]


def candidates(c: Comparison, methods: list[str], most: int | None = None) -> tuple[list[Candidate], list[Json]]:
    """Returns (candidates, refused methods). There are at most `most` candidates per method and model. A refused method
    cannot be used; its entry in the record gives the reason."""
    found, refused = [], []
    for name in methods:
        for model in c.bases:
            method = module("tools.compare.methods", name).method(c, model)
            if c.bases[model].hosted and c.task.test.kind == "choice":
                why = "endpoints do not return the log-probabilities of options: write :scorer=exact"
                method = method._replace(settings=(), refused=method.refused or why)
            on = f"@{model}" if len(c.bases) > 1 else ""
            made = [
                Candidate(_id(name + on, number, setting.values), name, model, method, setting)
                for number, setting in enumerate(method.settings[:most], 1)
            ]
            found += made
            if method.refused:
                refused.append(_row(name, model, method, "refused", method.refused))
    return found, refused


def _id(name: str, number: int, values: Json) -> str:
    """Makes the id of a candidate, such as "lora:lr=0.001". A long value, such as an instruction, is replaced by the
    number of the setting."""
    short = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
    each = (f"{key}={text if len(text := short(value)) < 20 else number}" for key, value in values.items())
    return ":".join(filter(None, [name, ",".join(each)]))


def _row(name: str, model: str, method: Method, status: str, why: str) -> Json:
    """Returns a method's entry in the record before anything has been measured."""
    return {
        "name": name,
        "model": model,
        "label": method.label,
        "how": method.how,
        "status": status,
        "why": why,
        "candidate": None,
        "documents": method.documents,
        "trained": any(setting.train is not None for setting in method.settings),
        "leaves": hosted.is_hosted(model) and hosted.parse(model).leaves,
        "tests": [],
        "request": None,
        "forgetting": None,
        "spent": {},
    }


DEVICES = "import jax, json; found = jax.devices(); print(json.dumps([found[0].device_kind, len(found)]))"


def here() -> Json:
    """Describes this machine. A separate process lists the devices, because only one process can use a TPU at a time
    and the jobs need it."""
    from common import chips

    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the devices cannot be used: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}", "jax")
    kind, count = json.loads(done.stdout.splitlines()[-1])
    chip = chips.find(kind)
    name = f"{chips.processor()}, {os.cpu_count()} cores" if kind == "cpu" else kind
    return {"name": name, "devices": count, "chip": chip and chip.name}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
