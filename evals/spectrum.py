"""Analyzes a weight update: its size, its rank, and the singular directions that the base model did not have.

    python -m evals.spectrum SOURCE [--base=MODEL] [--where=REGEX] [--out=FILE.jsonl]

SOURCE is a run folder, a PEFT folder or a model; a run folder needs no --base. Prints one row per parameter, with means
over its layers, and writes one line per layer to `--out`. The columns are explained in the function `figures`. The last
line printed shows the adapter's size, the time to merge it, and how much merging changes the logits.
"""

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, files
from common.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

    from infer.lm import LM
    from model.weights import Spec

# number of singular vectors that are compared, and the cosine below which a vector counts as new to the base model
TOP, COSINE = 10, 0.5


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("evals.spectrum", __doc__)
    parser.add_argument("source")
    parser.add_argument("--base", default="")
    parser.add_argument("--where", default=r"layers/.*")
    parser.add_argument("--out", default="")
    args = parser.parse_args(argv)
    rows, cost = change(args.source, args.base, args.where)
    if args.out:
        files.write_lines(Path(args.out), rows)
    show(rows, cost)


def change(source: str, base: str = "", where: str = r"layers/.*") -> tuple[list[dict], dict[str, float]]:
    """Returns (rows, cost). `rows` has the `figures` of every changed matrix whose name matches `where`, one row per
    layer; `cost` is the result of `merge_cost`."""
    import jax

    from infer.models import before_and_after
    from model import vectors, weights

    lm, before = before_and_after(source, base)
    old = {weights.name(at): x for at, x in jax.tree.leaves_with_path(before)}
    specs = {weights.name(at): s for at, s in jax.tree.leaves_with_path(lm.model.specs, is_leaf=weights.is_spec)}
    rows = []
    for name, delta in vectors.difference(lm.params, before, lm.model.specs).items():
        if specs[name].eqn and re.fullmatch(where, name) and delta.any():
            rows += [{"name": name, **row} for row in _layers(old[name], delta, specs[name])]
    if not rows:
        raise UserError("no matrix has changed", source, f"--where={where}")
    return rows, merge_cost(lm)


def _layers(old: "Array", delta: "np.ndarray", spec: "Spec") -> list[dict]:
    import jax
    import jax.numpy as jnp

    from model.peft import lora

    matrices = [lora.matrix(jnp.asarray(x, jnp.float32), spec) for x in (old, delta)]
    flat = [m.reshape(-1, *m.shape[-2:]) for m in matrices]
    columns = jax.device_get(jax.lax.map(lambda pair: figures(*pair), tuple(flat)))
    return [{"layer": i, **{k: float(x[i]) for k, x in columns.items()}} for i in range(len(flat[0]))]


def figures(w: "Array", delta: "Array") -> dict[str, "Array"]:
    """Computes figures that describe the change dW of a matrix W [in, out].

    `relative`: ||dW|| / ||W||. `cosine`: <W, W + dW> / (||W|| ||W + dW||). Let s be the singular values of dW.
    `effective_rank`: exp of the entropy of s / sum(s) (Roy & Vetterli 2007). `stable_rank`: sum(s^2) / s_1^2.
    `rank_90`: how many of the largest singular values are needed for 90 % of sum(s^2). `intruders`: how many of the
    first TOP output-side singular vectors of W + dW have a cosine below COSINE to every singular vector of W
    (Shuttleworth et al. 2024, arXiv 2410.21228).
    """
    import jax.numpy as jnp

    s = jnp.linalg.svd(delta, compute_uv=False)
    p, energy = s / s.sum(), jnp.square(s)
    known, found = (jnp.linalg.svd(m, full_matrices=False)[2] for m in (w, w + delta))
    similarity = jnp.abs(found[:TOP] @ known.T).max(-1)
    norm = jnp.linalg.norm
    return {
        "relative": norm(delta) / norm(w),
        "cosine": (w * (w + delta)).sum() / (norm(w) * norm(w + delta)),
        "effective_rank": jnp.exp(-jnp.where(p > 0, p * jnp.log(p), 0).sum()),
        "stable_rank": energy.sum() / energy[0],
        "rank_90": (jnp.cumsum(energy) < 0.9 * energy.sum()).sum() + 1,
        "intruders": (similarity < COSINE).sum(),
    }


def merge_cost(lm: "LM") -> dict[str, float]:
    """Returns the adapter's size in bytes, the seconds that merging it takes (without compilation), and the largest
    change of a logit that merging causes, divided by the largest logit."""
    import jax
    import numpy as np

    from model import weights

    if not any(map(weights.is_weight, jax.tree.leaves(lm.params, is_leaf=weights.is_weight))):
        return {}
    train, _ = weights.partition(lm.params, weights.trainable(lm.params, "adapters"))
    merge = jax.jit(lambda p: weights.dense(p, lm.model.specs))
    jax.block_until_ready(merge(lm.params))
    start = time.perf_counter()
    merged = jax.block_until_ready(merge(lm.params))
    seconds = time.perf_counter() - start
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (1, min(32, lm.config.max_len)))
    logits = jax.jit(lm.model.__call__)
    apart, joined = logits(lm.params, tokens), logits(merged, tokens)
    gap = float(abs(apart - joined).max() / abs(apart).max())
    return {"bytes": sum(x.nbytes for x in jax.tree.leaves(train)), "merge_seconds": seconds, "merge_gap": gap}


def show(rows: list[dict], cost: dict[str, float]) -> None:
    columns, means = [c for c in rows[0] if c not in ("name", "layer")], []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        means.append([name, len(mine), *(f"{sum(r[c] for r in mine) / len(mine):.4g}" for c in columns)])
    cli.table(means, ["parameter", "layers", *(c.replace("_", " ") for c in columns)])
    print(f"intruders: those of the first {TOP} singular vectors with cosines below {COSINE} to all of the base's")
    if cost:
        print(
            f"adapter {cost['bytes'] / 1e6:.2f} MB · merged in {cost['merge_seconds'] * 1e3:.1f} ms · "
            f"merging changes logits by at most {cost['merge_gap']:.1g} x the largest logit"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
