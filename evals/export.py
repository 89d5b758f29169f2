"""Writes a task's examples as data to train on: train.jsonl and heldout.jsonl, one record of messages a line.

    python -m evals.export --task=dates --out=runs/dates

`config.data.source` and `config.data.eval_source` take these files. A rerun writes the same bytes.
"""

import sys
from pathlib import Path

from common import files
from common.errors import UserError
from evals import task as tasks


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        given = dict(word.removeprefix("--").partition("=")[::2] for word in argv)
        if set(given) != {"task", "out"} or not all(given.values()):
            raise UserError("wants --task=NAME and --out=FOLDER", "evals.export")
        for path, n in export(given["task"], Path(given["out"])).items():
            print(f"{path}: {n} records")
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


def export(name: str, folder: Path) -> dict[str, int]:
    """Number of records by file written. A file appears whole or not at all."""
    task, written = tasks.load(name), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        path, records = folder / f"{split}.jsonl", list(tasks.records(task, split))
        files.write_lines(path, records)
        written[str(path)] = len(records)
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
