"""Tokenizes an experiment's data and shows the rows that training will see.

    python -m tools.prepare --config=configs/X.py [--config.key=value ...] [--strict]

The command prints statistics of the records, the columns and fields that are not used, and one packed row. In the
printed row, green tokens count in the loss and dim tokens do not. Control tokens are in reverse video, and | separates
documents. The tokenized data is stored in the cache that training reads, and its hashes are verified. Exit code 2 means
that the data cannot be used or, with --strict, that some columns, fields or files are not used.
"""

import sys

from common import cli
from common.errors import UserError
from common.types import Config
from configs import schema


@cli.command
def main(argv: list[str]) -> int | None:
    show(schema.load([arg for arg in argv if arg != "--strict"], usage=__doc__).config, "--strict" in argv)


def show(config: Config, strict: bool = False) -> None:
    from rich.console import Console

    from data import cache, sources
    from data.rows.batch import parts
    from data.rows.layout import painted
    from data.rows.loader import load_tokenizer, make_loaders

    console = Console(soft_wrap=True, highlight=False)
    tokenizer = load_tokenizer(config.data, default=_own_tokenizer(config))
    train, heldout = make_loaders(config.data, tokenizer, config.seed)
    for part in train.parts:
        cache.read(part.dataset.folder, check_hashes=True)
    console.print(f"{config.data.source} · {train.seq_len} tokens x {train.batch_size} rows per batch", markup=False)
    for name, value in _summary(train, heldout).items():
        console.print(f"{name:>18}  {value}", markup=False)
    for line in train.notes(tokenizer):
        console.print(f"{'note':>18}  {line}", markup=False)
    lost = [line for line in train.notes(tokenizer) if "unused: " in line]
    missed = {source: sources.passed_over(source) for source in sources.mixture(config.data.source)}
    lost += [f"{source}: not read: {', '.join(files)}" for source, files in missed.items() if files]
    if strict and lost:
        raise UserError("; ".join(lost), fix="use these columns and files, drop them, or omit --strict")
    for side, rows in parts(train.batch(0)).items():
        console.print(f"\n{side} 0 of step 0", style="bold")
        console.print(painted(rows, 0, tokenizer))


def _own_tokenizer(config: Config) -> str:
    if not config.init:
        return "bytes"
    from infer.models import open_model  # reads only file headers, not the weights

    return open_model(config.init).tokenizer_source


def _summary(train, heldout) -> dict[str, str]:
    report = train.report
    summary = {"documents": f"{report['documents']:,}", "tokens": f"{report['tokens']:,}"}
    summary["in the loss"] = f"{report['learnt'] / max(report['tokens'], 1):.1%} of the tokens"
    summary["bad"] = f"{report['bad']:,} skipped"
    summary |= {f"bad, reason {i}": line for i, line in enumerate(report["causes"], 1)}
    summary["cut"] = (
        f"{report['split']:,} into pieces, {report['truncated']:,} at seq_len, {report['dropped']:,} dropped"
    )
    summary["rows"] = f"{report['rows']:,} in {train.num_batches:,} batches per epoch, {report['fill']:.1%} full"
    summary["held out"] = f"{sum(heldout.sizes):,} rows" if heldout else "none"
    return summary


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
