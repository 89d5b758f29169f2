"""Defines `Problem`, a mistake in a config and its fix, and `ConfigError`, which reports all problems of a config at
once."""

import sys
from collections.abc import Iterable
from typing import NamedTuple

from common.errors import UserError, clipped


class Problem(NamedTuple):
    """A mistake in a config. `key` is written as the user types it, as in "config.optim.lr". `value` is empty if the
    user gave no value."""

    key: str
    value: str
    problem: str
    fix: str = ""

    def __str__(self) -> str:
        where = f"{self.key} = {self.value}" if self.value else self.key
        return " · ".join(part for part in (where, self.problem, self.fix) if part)


class ConfigError(UserError):
    """Reports all problems of a config, in a table if stderr is a terminal and otherwise in one line per problem."""

    def __init__(self, problems: Iterable[Problem], where: str = ""):
        self.problems = [Problem(*map(clipped, problem)) for problem in problems]
        n = len(self.problems)
        super().__init__(f"{n} problem{'s' if n > 1 else ''}", where, "see --help for every key")

    def __str__(self) -> str:
        if sys.stderr.isatty():
            return self.table()
        return "\n".join([super().__str__(), *map(str, self.problems)])

    def table(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, title=Text(super().__str__()), title_justify="left")
        for name in Problem._fields:
            table.add_column(name, no_wrap=name == "key")
        for problem in self.problems:
            table.add_row(*map(Text, problem))
        console = Console(stderr=True)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip()


def show(value: object) -> str:
    """Formats a value as the user would type it."""
    if isinstance(value, str):
        return value if value else '""'
    return repr(value)
