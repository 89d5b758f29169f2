"""Answers requests for embeddings in OpenAI's format. The embedder is loaded in addition to the language model."""

import base64
from collections.abc import Mapping

import numpy as np

from infer.embed import Embedder
from infer.serve import Refused

TEXTS = 2048  # maximum number of texts per request, as in OpenAI's API


def answer(content: Mapping[str, object], embedders: Mapping[str, Embedder]) -> dict:
    """Computes the response to a request. `content` is the request's JSON object. Raises Refused if any field is
    invalid or not supported, so that no field is silently ignored."""
    content = {key: value for key, value in content.items() if value is not None}
    name = str(content.get("model"))
    if (embedder := embedders.get(name)) is None:
        what = f"no embedder {name[:80]!r}; available: {', '.join(embedders) or 'none'}"
        raise Refused(404, what, "model", "model_not_found")
    if strange := set(content) - {"model", "input", "encoding_format", "dimensions", "user"}:
        raise Refused(400, f"{min(strange)[:80]} is not supported", min(strange)[:80], "unsupported_parameter")
    if content.get("dimensions", embedder.width) != embedder.width:
        raise Refused(
            400, f"this embedder's vectors have {embedder.width} dimensions", "dimensions", "unsupported_value"
        )
    form = content.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise Refused(400, "encoding_format must be float or base64", "encoding_format", "invalid_value")
    texts = content.get("input")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Refused(400, "input must be a nonempty string or a list of nonempty strings", "input", "invalid_value")
    if len(texts) > TEXTS:
        raise Refused(400, f"a request can have at most {TEXTS} texts", "input", "invalid_value")
    ids = embedder.encode(texts)
    tokens, vectors = sum(map(len, ids)), embedder.vectors(ids)
    rows = [{"object": "embedding", "index": i, "embedding": spelled(v, form)} for i, v in enumerate(vectors)]
    return {"object": "list", "data": rows, "model": name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def spelled(vector: np.ndarray, form: object) -> list[float] | str:
    """Formats a vector as a list of numbers or, as OpenAI's own client requests, as little-endian float32 bytes in
    base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
