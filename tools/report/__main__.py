"""Writes one page with the results and costs of runs, which are read from their folders.

    python -m tools.report RUN... [--out=report.html]

RUN is a run folder, either local or at gs://BUCKET/FOLDER, or a folder with an evals.jsonl from evals.main. The page is
one static HTML file without scripts or external resources. A summary with the suffix .md is written next to it.
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
