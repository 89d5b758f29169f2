"""Task arithmetic on tiny models: adds, subtracts and combines the weight updates of skills, and scores the results.

    python -m examples.skills --out=runs/skills [--seeds=3]

A tiny base model is first trained briefly on two tasks, adding two digits and copying words. Then one adapter is
trained on each task, and one adapter on both tasks. `tools.edit` combines the adapters. Each seed takes two minutes on
a laptop CPU. The sums are memorized, since all 100 sums occur in the training data, but the test words are new.
Expected result: an adapter raises the accuracy on its own task to 100 %, and lowers the accuracy on the other task.
"both - sums" is the adapter for both tasks minus the adapter for sums: it loses more accuracy on sums than on words.
"both - words" loses more accuracy on words. Merging two adapters by TIES keeps more of both skills than adding them,
and one adapter trained on both tasks keeps the most.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from configs import schema

TASKS = {"sums": "synthetic:add?n=4000&digits=1", "words": "synthetic:copy?n=4000&length=3"}
HELD_OUT, SEED = 200, 1000  # number of test questions, and the seed with which they are drawn


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("examples.skills", __doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    show([skills(Path(args.out) / f"seed{seed}", seed) for seed in range(args.seeds)])


def skills(out: Path, seed: int) -> dict[str, dict[str, float]]:
    """Trains and combines all models, and writes them to the folder `out`. Returns {model: {task: fraction of right
    answers}}."""
    base, runs = out / "base", {name: out / name for name in ("sums", "words", "both")}
    both = ",".join(TASKS.values())
    train(base, seed, {"data.source": both, "steps": "80"})
    for name, folder in runs.items():
        adapter = {"init": str(base), "peft.name": "lora", "peft.rank": "16", "optim.lr": "1e-3", "steps": "300"}
        train(folder, seed, adapter | {"data.source": TASKS.get(name, both)})
    sums, words, joint = map(str, runs.values())
    edits = {
        "both - sums": ("linear", [joint, f"{sums}:-1"]),
        "both - words": ("linear", [joint, f"{words}:-1"]),
        "sums + words, linear": ("linear", [sums, words]),
        "sums + words, TIES": ("ties", [sums, words]),
    }
    scores = {name: score(folder) for name, folder in {"base": base, **runs}.items()}
    for name, (method, sources) in edits.items():
        scores[name] = score(edited(sources, base, out / name.replace(" ", "_"), method))
    return scores


def train(folder: Path, seed: int, keys: dict[str, str]) -> None:
    """Trains a model with configs/sft/tiny.py and the changes in `keys`. A run that has already finished is skipped."""
    from train.main import run

    argv = [f"--config.{key}={value}" for key, value in {"seed": seed, "samples": "()", **keys}.items()]
    if code := run(schema.load(["--config=configs/sft/tiny.py", f"--workdir={folder}", *argv])):
        raise UserError(f"training ended with exit code {code}", str(folder))


def edited(sources: list[str], base: Path, to: Path, method: str) -> Path:
    from tools.edit import edit

    if not to.exists():
        edit(sources, str(base), str(to), method, density=0.5, seed=0, rank=0)
    return to


def score(folder: Path) -> dict[str, float]:
    from evals.run import evaluate
    from infer.models import load

    lm = load(folder)
    asked = {name: f"{spec}&seed={SEED}:split=all:scorer=exact:tokens=5" for name, spec in TASKS.items()}
    return {name: evaluate(task, lm, HELD_OUT, batch_size=HELD_OUT).mean for name, task in asked.items()}


def show(seeds: list[dict[str, dict[str, float]]]) -> None:
    rows = []
    for model in seeds[0]:
        found = [[scores[model][task] for scores in seeds] for task in TASKS]
        rows.append([model, *(f"{sum(x) / len(x):.0%} ({min(x):.0%}-{max(x):.0%})" for x in found)])
    title = f"accuracy on {HELD_OUT} questions, mean over {len(seeds)} seeds (lowest-highest)"
    cli.table(rows, ["model", *TASKS], title)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
