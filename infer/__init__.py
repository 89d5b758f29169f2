"""The door for notebooks: `from infer import load; lm = load("smollm2-135m-instruct"); lm.answer("...")`."""

from typing import Any


def load(name: Any, adapter: Any = None, dtype: str | None = None, tokenizer: Any = None) -> Any:
    """The LM of a folder, a .gguf file, a packaged model's name, a hub id or a run folder; see infer.models.load."""
    from infer import models  # jax is not imported before a model is wanted

    return models.load(name, adapter, dtype, tokenizer)


def load_many(name: Any, folders: dict[str, Any], dtype: str | None = None) -> Any:
    """The LM of a base with adapters {name: run or PEFT folder} to choose from; see infer.models.load_many."""
    from infer import models

    return models.load_many(name, folders, dtype)
