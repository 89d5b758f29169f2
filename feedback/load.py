"""Adds items and votes from Argilla or Label Studio to a database of feedback.main.

    python -m feedback.load --db=votes.db --file=export.json

The file is a list of Argilla records (as written by `to_json` in its SDK) or of Label Studio tasks (its JSON export).
If the database already has a person's vote on an item, it keeps that vote, so the same file can be loaded again.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from feedback import exchange
from feedback.store import OWNER, Stale, Store


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("feedback.load", __doc__)
    parser.add_argument("--db", required=True, help="a SQLite file; created if it does not exist")
    parser.add_argument("--file", required=True)
    args = parser.parse_args(argv)
    found = list(exchange.read(Path(args.file).expanduser()))
    if any(name == OWNER for _, votes in found for name, _ in votes):
        raise UserError(f"an annotator has the reserved name {OWNER!r}", args.file, "rename them")
    store, new = Store(Path(args.db).expanduser()), 0
    items, _ = store.add(item for item, _ in found)
    for item, votes in found:
        for name, content in votes:
            store.link(name)
            try:
                store.append("vote", name, item.hash, 0, content)
                new += 1
            except Stale:
                continue
    print(f"added {items:,} items and {new:,} votes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
