"""Features of answers: a frozen model's hidden state at the end of each answer, for small reward models."""

from collections.abc import Sequence

import numpy as np

from evals.task import Prompt
from infer.embed import Embedder
from infer.lm import LM


def at_end(lm: LM, prompts: Sequence[Prompt], answers: Sequence[str], longest: int = 128) -> np.ndarray:
    """[n,D] in float32, after the last layer's norm. Of longer rows, the model reads the last `longest` tokens."""
    ids = [lm.whole(prompt, answer)[-longest:] for prompt, answer in zip(prompts, answers, strict=True)]
    return Embedder(lm.model, lm.params, lm.tokenizer, "last", normalized=False, longest=longest).vectors(ids)
