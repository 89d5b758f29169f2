"""One page that says what runs cost and what they brought, from their folders alone.

    python -m tools.report RUN... [--out=report.html]

RUN is a run folder, here or at gs://BUCKET/FOLDER, or a folder with the evals.jsonl of evals.main. The page is one
static HTML file without scripts or links to elsewhere; report.md, its short form, is written beside it.
"""

import sys
from pathlib import Path

from common import cli
from tools.report import page


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.report", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--out", type=Path, default="report.html")
    args = parser.parse_args(argv)
    path = page.write(args.runs, args.out)
    print(f"{path}  {path.with_suffix('.md')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
