"""Makes training rows from the votes in a database of feedback.main, or converts the votes for Argilla or Label Studio.

    python -m feedback.export --db=votes.db --out=FOLDER [--each] [--format=rows|argilla|label-studio]

The following files are written to FOLDER, except those that would have no rows: preference.jsonl (prompt, chosen,
rejected), preference_ties.jsonl (the same pairs and also ties, for which the column `tie` is 1), rankings_2.jsonl to
rankings_4.jsonl (answers, ranks), kto.jsonl (completion, label), ratings_ASPECT.jsonl, corrections.jsonl (pairs in
which the edited answer is chosen and the original is rejected), sft.jsonl (the best answers), sft_corrections.jsonl,
and flags.jsonl. `train` and TRL read these files directly. If several people voted on an item, their votes are combined
into one ranking; with --each, every vote becomes its own ranking. Gold items are not exported, nor are decisions that
were undone or erased. --format=argilla or label-studio writes one file with items and votes, which `feedback.load` can
read.
"""

import sys
from pathlib import Path

from common import cli, files
from common.errors import UserError
from common.numbers import integer
from feedback import exchange, rows
from feedback.store import Store


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("feedback.export", __doc__)
    parser.add_argument("--db", required=True)
    parser.add_argument("--out", required=True, help="a folder; created if it does not exist")
    parser.add_argument("--each", action="store_true", help="export every vote instead of one ranking per item")
    parser.add_argument("--format", default="rows", help="rows, argilla or label-studio")
    args = parser.parse_args(argv)
    path, out = Path(args.db).expanduser(), Path(args.out).expanduser()
    if args.format not in ("rows", *exchange.WRITERS):
        raise UserError(f"unknown format {args.format!r}", "--format", f"rows or {' or '.join(exchange.WRITERS)}")
    if not path.is_file():
        raise UserError("no such file", str(path), "python -m feedback.main makes it")
    store = Store(path)
    items, state = list(store.items.values()), store.state
    if args.format == "rows":
        found = rows.rows(items, state, args.each)
        if flagged := list(rows.flags(items, state)):
            found["flags"] = flagged
        if not found:
            raise UserError("there are no decisions to export yet", str(path), "vote first")
    else:
        found = {args.format: exchange.WRITERS[args.format](items, state)}
    written(out, found, one=args.format != "rows")


def written(out: Path, found: rows.Rows, one: bool) -> None:
    """Writes the files. If a file from an earlier export would have no rows now, it is deleted, because it may contain
    decisions that have been erased since."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for old in out.glob("*.jsonl") if not one else ():
            if rows.known(old.stem) and old.stem not in found:
                old.unlink()
        for name, lines in sorted(found.items()):
            path = out / f"{name}.{'json' if one else 'jsonl'}"
            (files.write_json if one else files.write_lines)(path, lines)
            print(f"{path}: {integer(len(lines))} {'items' if one else 'rows'}")
    except OSError as e:
        raise UserError(f"the export cannot be written: {e.strerror}", str(out), "choose another --out") from e


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
