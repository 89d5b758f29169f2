"""Opens the inputs of a run: the pretrained model, the tokenizer, the tasks and the data."""

import contextlib
import copy
import math
from pathlib import Path

from jax.sharding import Mesh

from common import files
from common.errors import UserError, warn
from common.types import Config
from data.rows import batch as batches
from data.rows.loader import load_tokenizer, make_loaders, save_tokenizer
from data.text import formats, template
from data.text.tokenizer import Tokenizer
from evals import task
from evals.task import Task
from infer.models import Run, open_model
from model import build
from model.io.pretrained import Pretrained
from model.net.transformer import Transformer
from train.init import Blueprint
from train.keep import hosts
from train.mesh import row_shards
from train.source import Batches, Source, local_rows


def pretrained(cfg: Config) -> Pretrained | Run | None:
    """Opens the checkpoint that the config's `init` names, without reading its weights. Returns None if `init` is
    empty, which means random weights."""
    return open_model(cfg.init) if cfg.init else None


def model(cfg: Config) -> Transformer:
    """Builds the network of a config, without reading data."""
    start = pretrained(cfg)
    return build.model(cfg, start, vocabulary(cfg, start))


def tokenizer(cfg: Config, start: Pretrained | Run | None) -> Tokenizer:
    """Loads the tokenizer that the config names. The default is the tokenizer of the model in `init`, or the byte
    tokenizer if `init` is empty."""
    return load_tokenizer(cfg.data, default=start.tokenizer_source if start else "bytes")


def keep_tokenizer(found: Tokenizer, folder: Path, system: str = "") -> None:
    """Saves a copy of the tokenizer in the run folder.

    The system prompt of the training chats becomes the default system prompt of the saved chat template, so that the
    trained model and its exports are prompted as in training.
    """
    if not hosts.primary():
        return
    if system and (own := found.chat_template) is not None:
        found = copy.copy(found)
        found.chat_template = template.with_system(own, system)
        found.tool_template = found.tool_template and template.with_system(found.tool_template, system)
    place = folder / "tokenizer"
    with contextlib.suppress(UserError):  # a tokenizer that is missing, damaged or outdated is saved again
        if not place.is_symlink() and formats.load(place).fingerprint == found.fingerprint:
            return
    files.remove(place)
    save_tokenizer(found, place)


def vocabulary(cfg: Config, start: Pretrained | Run | None) -> int | None:
    """The size of the tokenizer's vocabulary, found without reading data. If the tokenizer is not trained yet, the size
    is read from its spec, such as "bpe:8192"."""
    spec = cfg.data.tokenizer or (start.tokenizer_source if start else "bytes")
    if spec.startswith(("bpe:", "spm:")):
        return int(spec.split(":")[1])
    return load_tokenizer(cfg.data, default=spec).vocab_size


def sources(cfg: Config, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Batches, Batches | None]:
    """Returns (training batches, held-out batches) on the mesh. The held-out batches are None when nothing is held
    out."""
    row_shards(cfg, mesh)
    mine = local_rows(mesh, cfg.data.batch_size)
    train, heldout = make_loaders(cfg.data, tokenizer, cfg.seed, mine)
    for line in train.notes(tokenizer) if hosts.primary() else ():
        warn(line)
    return Batches(train, mesh), heldout and Batches(heldout, mesh)


def tasks(cfg: Config) -> dict[str, Task]:
    """Loads the tasks in the config's `evals`. Returns {metric name: task}."""
    found = task.named(cfg.evals)
    for name, made in found.items() if hosts.primary() else ():
        for note in made.notes:
            warn("%s: %s", name, note)
    return found


def follow_epochs(cfg: Config) -> None:
    """If `epochs` is not 0, sets `steps` to the number of steps that this many passes over the training rows take,
    rounded up."""
    if cfg.epochs:
        train, _ = make_loaders(cfg.data, tokenizer(cfg, pretrained(cfg)), cfg.seed)
        cfg.steps = math.ceil(cfg.epochs * sum(train.sizes) / cfg.data.batch_size)


def source(blueprint: Blueprint, data: Batches, steps: int) -> Source:
    """Returns the source of the run's batches: the data or, for an on-policy objective, a source that samples answers
    to the prompts in the data.

    Raises UserError when the objective reads another kind of batch (data.rows.batch.KINDS) than the data have. Also
    raises UserError when a run of `steps` steps would end in the middle of a rollout, where the run cannot be saved.
    """
    objective, kind = blueprint.objective, data.loader.kind
    if objective.source:
        made = objective.source(data, blueprint)
        if not made.resumable(steps):
            fix = "choose a number of steps that completes the last rollout"
            raise UserError(f"{steps} steps end in the middle of a rollout", "config.steps", fix)
        return made
    if not batches.serves(kind, objective.batch):
        raise UserError(
            f"the objective needs batches of kind {objective.batch!r}, but the data have kind {kind!r}",
            "config.data",
            "choose an objective for these data, or data for this objective: preference pairs have kind 'pair'; for"
            " rows with a label or a rating see config.data.format",
        )
    if objective.check:
        objective.check(data.loader.values())
    return data
