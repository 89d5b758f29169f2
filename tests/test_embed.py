"""Encoders and their vectors: padding, pooling, the files of sentence-transformers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from infer import embed
from model.families import bert
from model.net.transformer import Transformer
from tests.helpers.encoders import BERT, encoder
from tests.helpers.models import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder(tmp_path_factory.mktemp("bert"))


def test_a_config_is_read_as_it_is_written():
    assert bert.config(json.loads(json.dumps(bert.hf_config(BERT)))) == BERT


def test_a_vector_does_not_depend_on_its_neighbors(folder):
    found = embed.load(folder)
    assert (found.pooling, found.normalized, found.longest) == ("mean", True, 8)
    texts = ["rain", "the rain in spain", "", "the " * 20, "spain"]
    whole = found.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, rtol=1e-5)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(found.embed([text])[0], whole[i], atol=1e-6)
    np.testing.assert_allclose(whole[3], found.embed(["the " * 6])[0], atol=1e-6)  # 8 tokens with [CLS] and [SEP]
    np.testing.assert_allclose(found.embed(["rain"], "query"), found.embed(["query: rain"]), atol=1e-6)
    assert found.embed([]).shape == (0, 16)


def test_a_token_sees_both_ways(folder):
    found = embed.load(folder)
    first = dataclasses.replace(found, pooling="first").embed(["the rain", "the spain"])
    assert np.abs(first[0] - first[1]).max() > 1e-3


def test_pooling_by_hand():
    """Two tokens and a padding slot."""
    x = jnp.array([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    there = jnp.array([[1, 1, 0]])
    for pooling, want in (("mean", [1.5, 2.0]), ("first", [3.0, 0.0]), ("last", [0.0, 4.0])):
        np.testing.assert_allclose(embed.pool(x, there, pooling, normalized=False), [want])
    np.testing.assert_allclose(embed.pool(x, there, "mean"), [[0.6, 0.8]])


def test_any_language_model_has_vectors(tmp_path):
    model = Transformer(TINY)
    from data.text import formats
    from model.io.export import export_hf

    export_hf(model, jax.jit(model.init)(jax.random.key(0)), formats.load("bytes"), tmp_path / "lm", check=False)
    found = embed.load(tmp_path / "lm")
    assert found.embed(["abc", "d"]).shape == (2, TINY.embed) and found.longest == TINY.max_len


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("modules.json", {"type": "x"}, "is not a list of modules"),
        ("modules.json", [{"type": "a.Dense"}], "module Dense is not supported"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_max_tokens": True},
            "pooling_mode_max_tokens is not supported",
        ),
        ("1_Pooling/config.json", {}, "pooling of no kind is not supported"),
    ],
)
def test_what_is_not_supported_is_one_line(file, content, message, folder, monkeypatch):
    old = (folder / file).read_text()
    try:
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            embed.load(folder)
    finally:
        (folder / file).write_text(old)
