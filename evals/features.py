"""Computes the features on which small reward models are trained: a frozen model's hidden state at the end of each
answer."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import files
from common.errors import reading
from data import splits
from evals import pairs
from evals.pairs import Pair
from infer.embed import Embedder
from infer.models import load

LONGEST = 128  # the model reads only the last LONGEST tokens of a prompt and its answer
CHUNK = 64  # number of pairs whose features are stored in one file


def differences(name: str, found: Sequence[Pair], folder: Path) -> np.ndarray:
    """Returns one row per pair [n,D]: the features of `chosen` minus those of `rejected`, as computed by the model
    `name`. Every column is divided by its root mean square.

    The features are cached in `folder` for later calls.
    """
    parts, lm = [], None
    for at in range(0, len(found), CHUNK):
        part = found[at : at + CHUNK]
        path = folder / f"features-{splits.key(repr((name, LONGEST, [p[:3] for p in part]))):016x}.npy"
        if not path.exists():
            lm = lm or load(name)
            ids = [lm.whole(p.prompt, answer)[-LONGEST:] for p in part for answer in p[1:3]]
            reader = Embedder(lm.model, lm.params, lm.tokenizer, "last", normalized=False, longest=LONGEST)
            vectors, file = reader.vectors(ids), io.BytesIO()
            np.save(file, vectors[0::2] - vectors[1::2], allow_pickle=False)
            files.write(path, file.getvalue())
            print(f"features of {name}: {at + len(part):,} of {len(found):,} pairs", flush=True)
        with reading(path, "delete the file"):
            parts.append(np.load(path, allow_pickle=False))
    x = np.concatenate(parts)
    return x / np.maximum(np.sqrt((x**2).mean(0)), 1e-6)


def predicted(name: str, found: Sequence[Pair], folds: int, folder: Path) -> np.ndarray:
    """Returns the predicted probability [n] that people prefer `chosen`. The pairs of each fold are predicted by a
    linear model that is fitted to the other folds."""
    x = differences(name, found, folder)
    return pairs.crossed(x, pairs.folds(found, folds), penalty(x))


def penalty(x: np.ndarray) -> float:
    """Returns the L2 penalty for features x [n,D] of unit variance. The penalty is equivalent to a Gaussian prior on
    the weights. The prior is chosen such that the predicted log-odds have unit variance, too."""
    return float(x.shape[1])
