"""The interface for notebooks: `from infer import load; lm = load("smollm2-135m-instruct"); lm.answer("...")`."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import outermost

if TYPE_CHECKING:
    from infer.lm import LM


@outermost
def load(
    name: str | Path,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
) -> "LM":
    """Loads an LM from a Hugging Face folder, a .gguf file, the name of a packaged model, a hub id or a run folder.
    infer.models.load explains the arguments."""
    from infer import models  # inside the function, so that jax is imported only when a model is loaded

    return models.load(name, adapter, dtype, tokenizer, strict)


@outermost
def load_many(
    name: str | Path, folders: dict[str, str | Path], dtype: str | None = None, *, strict: bool = False
) -> "LM":
    """Loads a base model with several adapters as one LM. `folders` maps the name of each adapter to its run folder or
    PEFT folder. infer.models.load_many explains the other arguments."""
    from infer import models

    return models.load_many(name, folders, dtype, strict=strict)
