"""One page that says what runs cost and what they brought, from their folders alone.

    python -m tools.report RUN... [--out=report.html]

RUN is a run folder, here or at gs://BUCKET/FOLDER, or a folder with the evals.jsonl of evals.main. The page is one
static HTML file without scripts or links to elsewhere; report.md, its short form, is written beside it.
"""

import sys
import tempfile
from pathlib import Path

from common import files, paths
from common.errors import UserError
from tools.report import data
from tools.report import page as report_page


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv) or not argv:
        print(__doc__)
        return 0 if argv else 2
    try:
        out = [word.partition("=")[2] for word in argv if word.startswith("--out=")]
        folders = [word for word in argv if not word.startswith("--")]
        if strange := [w for w in argv if w.startswith("--") and not w.startswith("--out=")]:
            raise UserError("unknown option", strange[0], "--out=report.html is the only one")
        page = write(folders, Path(out[-1] if out and out[-1] else "report.html"))
        print(f"{page}  {page.with_suffix('.md')}")
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


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
