"""One page that says what runs cost and what they brought, from their folders alone.

    python -m tools.report RUN... [--out=report.html]

RUN is a run folder, here or at gs://BUCKET/FOLDER, or a folder with the evals.jsonl of evals.main. The page is one
static HTML file without scripts or links to elsewhere; report.md, its short form, is written beside it.
"""

import sys
import tempfile
from pathlib import Path

from common import cli, files, paths
from common.errors import UserError
from tools.report import data
from tools.report import page as report_page


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.report", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--out", type=Path, default="report.html")
    args = parser.parse_args(argv)
    page = write(args.runs, args.out)
    print(f"{page}  {page.with_suffix('.md')}")


def write(folders: list[str | Path], out: Path) -> Path:
    """Writes the page at `out` and its short form; both appear whole or not at all. Raises UserError."""
    if not folders:
        raise UserError("no run folders", "tools.report", "python -m tools.report runs/a runs/b")
    with tempfile.TemporaryDirectory() as scratch:
        runs = [data.read(local(folder, scratch)) for folder in folders]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in ((out, report_page.html(runs)), (out.with_suffix(".md"), report_page.markdown(runs))):
            files.write(path, text)
    except OSError as e:
        raise UserError(f"cannot be written: {e.strerror}", str(out), "choose another --out") from e
    return out


def local(folder: str | Path, scratch: str) -> Path:
    """The folder, or a copy in `scratch` of what a run at gs://BUCKET/FOLDER holds beside its checkpoints."""
    home = paths.parse(folder)
    if not paths.remote(home):
        return home
    copy = Path(scratch) / files.mirror(home).name / home.name
    copy.mkdir(parents=True)
    with paths.told(home):
        files.fetch(home, copy)
    return copy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
