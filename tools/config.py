"""Inspects experiments without running them.

    python -m tools.config show --config=configs/X.py[:ARG] [--config.key=value ...]
                                              shows all keys; * marks those that differ from configs/base.py
    python -m tools.config diff A B           shows the keys that differ; A and B are config files or run folders
    python -m tools.config check [FILE ...]   checks config files, by default all under configs/

If there are problems, all of them are printed to stderr, and the exit code is 2.
"""

import sys
from pathlib import Path

from common import cli
from common.errors import UserError
from configs import base, schema
from configs.schema import describe, overrides
from configs.schema.problems import show as shown

CONFIGS = Path(base.__file__).parent


@cli.command
def main(argv: list[str]) -> int | None:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print(__doc__)
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}", "tools.config", f"one of {', '.join(VERBS)}")
    return VERBS[verb](rest)


def show(argv: list[str]) -> None:
    config = schema.load(argv, usage=__doc__).config
    default = schema.flatten(base.get_config())
    leaves = schema.flatten(config)
    same = lambda path: path in default and leaves[path] == default[path]
    lines = (("  " if same(line.partition("=")[0]) else "* ") + line for line in describe.lines(config))
    print("\n".join(lines))


def diff(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("diff takes two config files or run folders", "tools.config diff", "diff A B")
    for path, old, new in schema.diff(*map(_resolved, argv)):
        print(f"{path}: {shown(old)} -> {shown(new)}")


def _resolved(spec: str) -> schema.ConfigDict:
    """Returns the config in a config file, resolved, or the config of a run folder. The latter is not resolved, since
    an older version may have written other keys."""
    path, arg = overrides.split_arg(spec)
    config = schema.read(path, arg)
    return schema.resolve(config, where=path)[0] if path.endswith(".py") else config


def check(argv: list[str]) -> int:
    bad = 0
    for path in argv or map(str, experiments()):
        if not argv or is_experiment(Path(path)):
            try:
                schema.resolve(schema.read(path), where=path)
                print(f"{path} · ok")
            except UserError as e:
                bad += 1
                print(e, file=sys.stderr)
    return 2 if bad else 0


def experiments() -> list[Path]:
    """Returns the config files of all experiments in the folders under configs/."""
    return [path for path in sorted(CONFIGS.glob("*/**/*.py")) if is_experiment(path)]


def is_experiment(path: Path) -> bool:
    """Whether a file is an experiment. The files matched by a glob such as configs/**/*.py include other modules."""
    parent = path.resolve().parent
    return parent not in (CONFIGS, CONFIGS / "schema") and path.name != "__init__.py"


VERBS = {"show": show, "diff": diff, "check": check}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
