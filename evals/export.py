"""Writes a task's examples as training data: train.jsonl, validation.jsonl and heldout.jsonl, one chat per line.

    python -m evals.export --task=dates --out=runs/dates

Use the files as `config.data.source` and `config.data.eval_source`. Running the command again writes identical files.
"""

import sys
from pathlib import Path

from common import cli, files
from evals import task as tasks


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("evals.export", __doc__)
    parser.add_argument("--task", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    for path, n in export(args.task, args.out).items():
        print(f"{path}: {n} records")


def export(name: str, folder: Path) -> dict[str, int]:
    """Exports a task to files, each of which is written atomically. Returns {path: number of records}."""
    task, written = tasks.load(name), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "heldout"):
        path, records = folder / f"{split}.jsonl", list(tasks.records(task, split))
        files.write_lines(path, records)
        written[str(path)] = len(records)
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
