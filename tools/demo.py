"""Trains models on this machine and compares prompting, LoRA and full fine-tuning: quality and cost.

    python -m tools.demo [--out=runs/demo]

First a small decoder is pretrained from random weights. Then SmolLM2-135M-Instruct reads dates in old speeches:
zero-shot, with examples in the prompt, tuned by LoRA, and fully fine-tuned. Each stage is a command that you can run
yourself; its output is logged next to its results. After an interruption, run the demo again: finished stages are
skipped, and a training run resumes from its last checkpoint.
"""

import sys
from pathlib import Path

from common import cli, files, jobs, record
from common.jobs import Stage

TASK, SHOTS, EXAMPLES, TEXT, PASSAGES = "dates", "0,4", 100, "pydocs", 12
MODEL = "smollm2-135m-instruct"


@cli.command
def main(argv: list[str]) -> int:
    parser = cli.Parser("tools.demo", __doc__)
    parser.add_argument("--out", type=Path, default="runs/demo")
    return demo(parser.parse_args(argv).out)


def demo(out: Path) -> int:
    """Runs the remaining stages. Returns 0 if done, 75 if interrupted, else the exit code of the stage that failed."""
    out.mkdir(parents=True, exist_ok=True)
    code = jobs.run(stages(out), out)
    if code == 0:
        print((out / "report.md").read_text("utf-8").split("\n## ")[0].partition("\n")[2].strip())
        print(f"\nThe report: {out / 'report.html'}")
    return code


def stages(out: Path) -> list[Stage]:
    data = [f"--config.data.source={out}/{TASK}/train.jsonl", f"--config.data.eval_source={out}/{TASK}/heldout.jsonl"]
    folders = [str(out / name) for name in ("prompting", "lora", "full", "pretrain")]
    return [
        _train("pretraining of a small model", out / "pretrain", 75),
        Stage(
            "examples of the task",
            ["evals.export", f"--task={TASK}", f"--out={out / TASK}"],
            lambda: float((out / TASK / "heldout.jsonl").exists()),
            5,
        ),
        _measure("SmolLM2 zero-shot and with examples in the prompt", MODEL, out / "prompting", SHOTS, 110),
        _train("LoRA", out / "lora", 60, *data),
        _measure("the model tuned by LoRA", out / "lora", out / "lora", "0", 40),
        _train("full fine-tuning", out / "full", 65, *data),
        _measure("the fully fine-tuned model", out / "full", out / "full", "0", 40),
        Stage("the report", ["tools.report", *folders, f"--out={out / 'report.html'}"], lambda: 0.0, 3),
    ]


def _train(title: str, folder: Path, seconds: float, *more: str) -> Stage:
    argv = ["train.main", f"--config=configs/demo/{folder.name}.py", f"--workdir={folder}", *more]
    return Stage(title, argv, lambda: trained(folder), seconds)


def _measure(title: str, model: str | Path, folder: Path, shots: str, seconds: float) -> Stage:
    argv = ["evals.main", f"--model={model}", f"--tasks={TASK}", f"--shots={shots}", f"--n={EXAMPLES}"]
    argv += [f"--text={TEXT}", f"--passages={PASSAGES}", f"--out={folder}"]
    return Stage(title, argv, lambda: measured(folder, len(shots.split(",")) + 1), seconds)


def trained(folder: Path) -> float:
    """The fraction of a run's steps that are done; 1 only if its last line says so."""
    lines = record.read(folder / "metrics.jsonl")
    if any(line.get("event") == "done" for line in lines[-1:]):
        return 1.0
    steps = files.read_json(folder / "config.json").get("steps", 1)
    return min(0.99, max((line["step"] for line in lines), default=0) / steps)


def measured(folder: Path, results: int) -> float:
    """The fraction of the results that exist and are not older than their run."""
    since = max((line.get("time", 0) for line in record.read(folder / "metrics.jsonl")), default=0)
    fresh = [line for line in files.read_lines(folder / "evals.jsonl") if line["time"] >= since]
    return min(1.0, len({(line.get("task"), line.get("shots"), line.get("text")) for line in fresh}) / results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
