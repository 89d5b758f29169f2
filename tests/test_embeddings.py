"""The endpoint for vectors: OpenAI's format, every field read or refused."""

import base64

import numpy as np
import pytest

from infer import embed
from infer.serve import Refused, embeddings
from tests.helpers.encoders import encoder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return embed.load(encoder(tmp_path_factory.mktemp("encoder")))


def test_one_text_and_several_in_both_encodings(embedder):
    ask = lambda **content: embeddings.answer({"model": "e", **content}, {"e": embedder})
    wanted = embedder.embed(["rain", "the rain in spain"])
    one = ask(input="rain")
    np.testing.assert_allclose(one["data"][0]["embedding"], wanted[0], rtol=1e-6)
    assert one["usage"] == {"prompt_tokens": 3, "total_tokens": 3} and one["model"] == "e"
    two = ask(input=["rain", "the rain in spain"], encoding_format="base64", user="u", dimensions=16)
    found = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in two["data"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert [row["index"] for row in two["data"]] == [0, 1]


@pytest.mark.parametrize(
    "content, status, message",
    [
        ({"model": "x", "input": "a"}, 404, "no embedder 'x'; available: e"),
        ({"model": "e"}, 400, "input must be a nonempty string"),
        ({"model": "e", "input": ["a", ""]}, 400, "input must be a nonempty string"),
        ({"model": "e", "input": [1, 2]}, 400, "input must be a nonempty string"),
        ({"model": "e", "input": "a", "dimensions": 3}, 400, "vectors have 16 dimensions"),
        ({"model": "e", "input": "a", "encoding_format": "int8"}, 400, "float or base64"),
        ({"model": "e", "input": "a", "truncate": True}, 400, "truncate is not supported"),
        ({"model": "e", "input": ["a"] * 2049}, 400, "at most 2048 texts"),
    ],
)
def test_what_is_not_supported_is_refused(content, status, message, embedder):
    with pytest.raises(Refused, match=message) as error:
        embeddings.answer(content, {"e": embedder})
    assert error.value.status == status
