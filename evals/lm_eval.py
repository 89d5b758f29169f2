"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness.

    python -m evals.lm_eval --model=NAME_OR_RUN --tasks=NAME,... [--include=FOLDER] [--shots=N] [--limit=N] [--chat]
                            [--adapter=RUN] [--rows=16] [--out=FILE.json]

Install the harness with `pip install --no-deps -r requirements/lm_eval.txt`. The command prints the harness's table of
results, and writes the results to `--out`. `--include` is a folder with task files of your own, which may read rows
from local files. `--chat` formats the questions with the model's chat template.
"""

import sys
from pathlib import Path

from common import cli, files
from common.errors import UserError


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("evals.lm_eval", __doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", required=True, type=cli.listed)
    for name in ("include", "adapter", "out"):
        parser.add_argument(f"--{name}", default="")
    for name, default in dict(shots=None, limit=None, rows=16).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    parser.add_argument("--chat", action="store_true")
    args = parser.parse_args(argv)
    try:
        from lm_eval import evaluator, utils
        from lm_eval.tasks import TaskManager

        from evals.harness import Adapter
    except ImportError as e:
        what = f"lm-evaluation-harness is required, but {e.name} is not installed"
        raise UserError(what, "evals.lm_eval", "pip install --no-deps -r requirements/lm_eval.txt") from None
    from infer.models import load

    tasks = TaskManager(include_path=args.include or None)
    if unknown := [name for name in args.tasks if not tasks.match_tasks([name])]:
        fix = "name a task of the harness, or of a file in the folder --include"
        raise UserError(f"no task {unknown[0]!r}", "--tasks", fix)
    lm = Adapter(load(args.model, adapter=args.adapter or None), args.model, args.rows)
    found = evaluator.simple_evaluate(
        lm,
        tasks=args.tasks,
        num_fewshot=args.shots,
        limit=args.limit,
        task_manager=tasks,
        apply_chat_template=args.chat,
    )
    if found is None:
        return
    print(utils.make_table(found))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_json(Path(args.out), files.plain({k: found[k] for k in ("results", "n-shot", "versions")}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
