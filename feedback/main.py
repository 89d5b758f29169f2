"""Serves a web page on this machine, on which people rank, rate and correct the answers of models.

    python -m feedback.main --db=votes.db --items=items.jsonl [--annotators=ann,bob] [--guidelines=guide.txt]
                            [--aspects=helpful,honest] [--votes=2] [--base-url=https://team.example/feedback]
                            [--port=8700]
    python -m feedback.main --db=votes.db --erase=ann

An item is a row with `prompt` (text or messages) and two to four `answers`, which are texts or objects with text, model
and sampling. An item may also have `judge` ({model, ranks, why}, shown after the vote), `gold` (ranks that are known to
be right, to test annotators) and `aspects` (names of qualities that are rated from 1 to 5). Each person gets a secret
link, which stays the same; the owner's link shows everybody's figures and the disagreements. Votes are stored in --db,
from which `python -m feedback.export` makes training rows. --erase removes this person's decisions from all figures and
exports.
"""

import sys
from pathlib import Path
from urllib.parse import urlsplit

from common import cli, loopback
from common.errors import UserError, reading
from feedback import items, server
from feedback.store import OWNER, Store

LONGEST = 1 << 20  # maximum bytes of the guidelines


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("feedback.main", __doc__)
    parser.add_argument("--db", required=True, help="a SQLite file, made if there is none")
    parser.add_argument("--items", default="", help="rows to add to the items already in --db")
    parser.add_argument("--annotators", type=cli.listed, default=[], help="names, separated by commas; default: me")
    parser.add_argument("--aspects", type=cli.listed, default=[], help="aspects to rate, for new items that list none")
    parser.add_argument("--guidelines", default="", help="a text file; other text is a new version")
    parser.add_argument("--votes", type=cli.count, default=0, help="people who should judge each item; 0: everybody")
    parser.add_argument("--base-url", default="", help="address of a proxy on this machine that forwards requests")
    parser.add_argument("--port", type=int, default=8700, help="0: any free port")
    parser.add_argument("--erase", default="", metavar="NAME", help="delete this person's decisions, and exit")
    args = parser.parse_args(argv)
    base = checked(args.base_url)
    if OWNER in args.annotators:
        raise UserError(f"{OWNER!r} has a link already", "--annotators", "choose another name")
    store = Store(Path(args.db).expanduser())
    if args.erase:
        if args.erase not in store.people():
            known = ", ".join(store.people()) or "nobody"
            raise UserError(f"nobody is called {args.erase!r}", "--erase", f"there is {known}")
        print(f"{store.erase(args.erase):,} decisions of {args.erase} no longer count")
        return
    if args.items:
        new, seen = store.add(items.read(args.items, args.aspects))
        print(f"{new:,} items are new" + f", {seen:,} were here already" * bool(seen))
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
