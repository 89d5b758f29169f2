"""Serves a web page from this machine, on which people rank, rate and correct answers written by models.

    python -m feedback.main --db=votes.db --items=items.jsonl [--annotators=ann,bob] [--guidelines=guide.txt]
                            [--aspects=helpful,honest] [--votes=2] [--base-url=https://team.example/feedback]
                            [--port=8700]
    python -m feedback.main --db=votes.db --erase=ann

Each item is a row with `prompt` (text or messages) and two to four `answers`, which are texts or objects with text,
model and sampling. An item may also have `judge` ({model, ranks, why}, shown only after the vote), `gold` (ranks that
are known to be right, to test annotators) and `aspects` (names of qualities to rate from 1 to 5). Each person gets a
secret link, which never changes. The owner's link shows statistics about all people, and their disagreements. Votes are
stored in --db, from which `python -m feedback.export` makes training rows. --erase removes all decisions of the given
person from figures and exports.
"""

import sys
from pathlib import Path
from urllib.parse import urlsplit

from common import cli, loopback
from common.errors import UserError, reading
from feedback import items, server
from feedback.store import OWNER, Store

LONGEST = 1 << 20  # maximum size of the guidelines, in bytes


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("feedback.main", __doc__)
    parser.add_argument("--db", required=True, help="a SQLite file; created if it does not exist")
    parser.add_argument("--items", default="", help="items to add to those in --db")
    parser.add_argument("--annotators", type=cli.listed, default=[], help="names separated by commas; default: me")
    parser.add_argument("--aspects", type=cli.listed, default=[], help="aspects to rate, for new items that list none")
    parser.add_argument("--guidelines", default="", help="a text file; a changed text becomes a new version")
    parser.add_argument("--votes", type=cli.count, default=0, help="how many people vote on each item; 0: everybody")
    parser.add_argument("--base-url", default="", help="public address of a proxy on this machine")
    parser.add_argument("--port", type=int, default=8700, help="0: any free port")
    parser.add_argument("--erase", default="", metavar="NAME", help="erase this person's decisions, then exit")
    args = parser.parse_args(argv)
    base = checked(args.base_url)
    if OWNER in args.annotators:
        raise UserError(f"{OWNER!r} is reserved and has a link already", "--annotators", "choose another name")
    store = Store(Path(args.db).expanduser())
    if args.erase:
        if args.erase not in store.people():
            known = ", ".join(store.people()) or "nobody"
            raise UserError(f"nobody is called {args.erase!r}", "--erase", f"there is {known}")
        print(f"{store.erase(args.erase):,} decisions of {args.erase} no longer count")
        return
    if args.items:
        new, seen = store.add(items.read(args.items, args.aspects))
        print(f"added {new:,} items" + f"; {seen:,} were in the database already" * bool(seen))
    if args.guidelines:
        store.guide(text(Path(args.guidelines).expanduser()))
    if not store.items:
        raise UserError("no items", args.db, "add some: --items=FILE")
    for name in args.annotators or ([] if store.people() else ["me"]):
        store.link(name)
    with loopback.listen(args.port) as listening:
        port = listening.getsockname()[1]
        base = base or f"http://{loopback.HOST}:{port}"
        for name in (*store.people(), OWNER):
            print(f"{name}: {base}/{store.link(name)}/", flush=True)
        server.serve(server.application(store, port, base, args.votes)).run(sockets=[listening])
    store.close()


def checked(base: str) -> str:
    parts = urlsplit(base)
    if base and (parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment):
        raise UserError(f"{base!r} is not an address", "--base-url", "as in https://team.example/feedback")
    return base.rstrip("/")


def text(path: Path) -> str:
    with reading(path):
        data = path.read_bytes()
        if len(data) > LONGEST:
            raise UserError(f"more than {LONGEST >> 20} MiB", str(path), "shorten the guidelines")
        return data.decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
