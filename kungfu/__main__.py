"""Kungfu: prompt, tune, compare, serve and export language models.

    kungfu VERB [OPTION ...]      in any folder; the same as python -m MODULE [OPTION ...] in the checkout
    kungfu VERB --help            what the verb does and takes
    kungfu --completion=bash      a line for your shell's start-up file, or =zsh

A file such as configs/sft/tiny.py is looked for in the current folder first, then in the checkout.
"""

import ast
import os
import sys
from pathlib import Path

from common import cli
from common.errors import UserError, did_you_mean
from kungfu import ROOT

NAMED = {
    "train": "train.main", "eval": "evals.main", "lm-eval": "evals.lm_eval", "task-data": "evals.export",
    "spectrum": "evals.spectrum", "decide": "tools.compare.page", "audit": "tools.compare.audit",
    "feedback": "feedback.main",
}  # fmt: skip
SHELLS = {
    "bash": "complete -o default -W '{verbs}' kungfu",
    "zsh": 'compdef \'_arguments "1:verb:({verbs})" "*:file:_files"\' kungfu',
}


@cli.command
def main(argv: list[str]) -> int | None:
    verb, *rest = argv or ["--help"]
    known = verbs()
    if verb in ("-h", "--help"):
        width = max(map(len, known))
        lines = [f"  {name:<{width}}  {first_line(module)}" for name, module in known.items()]
        print(__doc__.strip(), "", *lines, "", f"The checkout: {ROOT}", sep="\n")
        return None
    option, _, shell = verb.partition("=")
    if option == "--completion":
        if shell not in SHELLS:
            raise UserError(f"no completion for {shell!r}", "--completion", f"one of {', '.join(SHELLS)}")
        print(SHELLS[shell].format(verbs=" ".join(known)))
        return None
    if verb not in known:
        raise UserError(f"no verb {verb!r}", "kungfu", did_you_mean(verb, list(known), "kungfu lists them"))
    forward(known[verb], rest)


def verbs() -> dict[str, str]:
    """Returns {verb: module}: every command in tools/, named after its file, and the commands of other packages."""
    places = {path.parent if path.name == "__main__.py" else path: path for path in commands()}
    return NAMED | {place.stem.replace("_", "-"): f"tools.{place.stem}" for place in places}


def commands() -> list[Path]:
    files = [*(ROOT / "tools").glob("*.py"), *(ROOT / "tools").glob("*/__main__.py")]
    return sorted(path for path in files if '__name__ == "__main__"' in path.read_text("utf-8"))


def first_line(module: str) -> str:
    """Returns the first line of a module's docstring without importing the module."""
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def forward(module: str, argv: list[str]) -> None:
    """Replaces this process by `python -m module`. The new process and its children import the checkout's packages, not
    packages in the current folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    os.execve(
        sys.executable,
        [sys.executable, "-m", module, *argv],
        os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    )


def console() -> None:
    """The entry point of the installed command."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    console()
