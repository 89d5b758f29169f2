"""What a run starts from: a pretrained model, its tokenizer, the data."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from train.objectives import Objective


def pretrained(cfg: Any) -> Any | None:
    """The opened checkpoint of `init`, weights not read yet; None for a random start."""
    if not cfg.init:
        return None
    from infer.models import open_model

    return open_model(cfg.init)


def tokenizer(cfg: Any, start: Any | None, folder: Path) -> Any:
    """The tokenizer of the config, else that of `init`, else bytes; a copy stays in the run folder."""
    from data.rows.loader import load_tokenizer
    from train.keep import hosts

    found = load_tokenizer(cfg.data, default=start.tokenizer_source if start else "bytes")
    if hosts.primary() and not (folder / "tokenizer").exists():
        found.save(folder / "tokenizer")
    return found


def vocabulary(cfg: Any, start: Any | None) -> int | None:
    """Size of the tokenizer's vocabulary where it is known without reading data; None where it must be trained."""
    from data.rows.loader import load_tokenizer

    spec = cfg.data.tokenizer or (start.tokenizer_source if start else "bytes")
    if spec.startswith(("bpe:", "spm:")):
        return int(spec.split(":")[1])
    return load_tokenizer(cfg.data, default=spec).vocab_size


def sources(cfg: Any, tokenizer: Any, mesh: Any) -> tuple[Any, Any | None]:
    """Training and held-out batches on the mesh; held-out is None when nothing is held out."""
    from data.rows.loader import make_loaders
    from train.mesh import row_shards
    from train.source import Source, local_rows

    row_shards(cfg, mesh)
    mine = local_rows(mesh, cfg.data.batch_size)
    train, heldout = make_loaders(cfg.data, tokenizer, cfg.seed, mine)
    return Source(train, mesh), heldout and Source(heldout, mesh)


def check(objective: Objective, kind: str) -> None:
    """Raises UserError when the data give batches of another kind (data.rows.batch.KINDS) than the objective reads."""
    if kind != objective.batch:
        raise UserError(
            f"the objective reads batches of kind {objective.batch!r}; the data give {kind!r}",
            "config.data",
            "choose an objective for these data, or data for this objective: preference pairs are of kind 'pair'",
        )
