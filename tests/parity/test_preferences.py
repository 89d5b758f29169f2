"""Losses of preferences against TRL's trainers, and an exported reward model against transformers and PEFT."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from data.text import formats as tokenizers  # noqa: E402
from model import heads  # noqa: E402
from model.io import export, peft_write  # noqa: E402
from model.io.pretrained import open_pretrained  # noqa: E402
from model.net.transformer import Transformer  # noqa: E402
from model.peft import lora  # noqa: E402
from tests.helpers.models import TINY, random_model  # noqa: E402
from train.objectives import cpo, dpo, kto, orpo, ranking, reward, simpo  # noqa: E402

pytestmark = pytest.mark.parity

PAIRS = {
    "prompt": ["1 plus 2 is", "say hello", "a", "the color of the sky"],
    "chosen": [" three", " hello", " b c d", " blue"],
    "rejected": [" twelve or so", " no", " z", " a shade of green"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny Llamas with random weights, the policy and its reference, and a byte tokenizer."""
    path = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=257, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    for seed, name in enumerate(("policy", "ref")):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(path / name)
    return path


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<eos>", "<pad>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def settings(make, tmp_path, **more):
    return make(
        output_dir=str(tmp_path), per_device_train_batch_size=4, report_to=[], max_length=None, bf16=False,
        use_cpu=True, gradient_checkpointing=False, disable_dropout=True, **more,
    )  # fmt: skip


def ours(ids, learnt):
    """Token ids [B,T] and which of them belong to an answer as one of our batches."""
    ids, learnt = np.asarray(ids, np.int32), np.asarray(learnt, np.float32)
    pad = np.zeros((len(ids), 1))
    there = (ids != 257).astype(np.int32)
    return {
        "tokens": ids,
        "targets": np.concatenate([ids[:, 1:], pad], 1).astype(np.int32),
        "mask": np.concatenate([learnt[:, 1:], pad], 1).astype(np.float32),
        "segments": there,
        "positions": np.maximum(there.cumsum(1) - 1, 0),
    }


def opened(path):
    found = open_pretrained(str(path))
    model = Transformer(found.config)
    return model, found.load(model.specs)


def compare(theirs, torch_model, objective, roles, batch):
    """A loss and its gradient by the embedding."""
    torch_model.zero_grad()
    theirs.backward()
    wanted = next(p for n, p in torch_model.named_parameters() if n.endswith("embed_tokens.weight")).grad.numpy()

    def loss(policy):
        total, weight = objective.loss(roles | {"policy": policy}, batch, jax.random.key(0))["loss"]
        return total / weight

    found, grads = jax.jit(jax.value_and_grad(loss))(roles["policy"])
    np.testing.assert_allclose(found, theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(grads["embed"]["table"], wanted, atol=1e-5 * np.abs(wanted).max())


def sides(rows):
    half = len(rows["tokens"]) // 2
    return {"chosen": {n: x[:half] for n, x in rows.items()}, "rejected": {n: x[half:] for n, x in rows.items()}}


def roles_of(folder):
    model, policy = opened(folder / "policy")
    return model, {"policy": policy, "ref": opened(folder / "ref")[1]}


@pytest.mark.parametrize(
    "theirs, mine",
    [
        ({"loss_type": "sigmoid"}, {}),
        ({"loss_type": "hinge"}, {"loss": "hinge"}),
        ({"loss_type": "ipo"}, {"loss": "ipo"}),
        ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss": "robust", "label_smoothing": 0.2}),
        ({"loss_type": "sigmoid_norm"}, {"length_normalized": True}),
    ],
    ids=lambda x: str(x.get("loss_type", "")),
)
def test_dpo(theirs, mine, folder, tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    trainer = trl.DPOTrainer(
        load(folder / "policy"), load(folder / "ref"), settings(trl.DPOConfig, tmp_path, beta=0.3, **theirs),
        train_dataset=Dataset.from_dict(PAIRS), processing_class=tokenizer(),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = sides(ours(inputs["input_ids"], inputs["completion_mask"]))
    model, roles = roles_of(folder)
    loss = trainer.compute_loss(trainer.model, inputs)
    compare(loss, trainer.model, dpo.make(model, beta=0.3, **mine), roles, batch)


def test_dpo_with_an_sft_term(folder, tmp_path):
    """TRL's is a mean over the tokens of all chosen answers, the paper's (and ours) over those of each: of one pair
    they are the same."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    trainer = trl.DPOTrainer(
        load(folder / "policy"), load(folder / "ref"),
        settings(trl.DPOConfig, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
        train_dataset=Dataset.from_dict({name: column[:1] for name, column in PAIRS.items()}),
        processing_class=tokenizer(),
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    model, roles = roles_of(folder)
    batch = sides(ours(inputs["input_ids"], inputs["completion_mask"]))
    loss = trainer.compute_loss(trainer.model, inputs)
    compare(loss, trainer.model, dpo.make(model, sft_weight=0.5), roles, batch)


def test_kto(folder, tmp_path):
    """Mismatched answers, their KL and both losses; one batch holds all rows, as TRL shifts answers within it."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    rows = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False, True, True]}
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.5}
    trainer = trl.KTOTrainer(
        load(folder / "ref"), load(folder / "policy"), settings(trl.KTOConfig, tmp_path, beta=0.3, **weights),
        train_dataset=Dataset.from_dict(rows), processing_class=tokenizer(),
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    model, roles = roles_of(folder)
    roles = {"policy": roles["ref"], "ref": roles["policy"]}  # this way round, the KL is above 0
    width = 40  # room for every mismatched row
    ids, learnt = (np.asarray(inputs[name]) for name in ("input_ids", "completion_mask"))
    ids = np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=257)
    learnt = np.pad(learnt, ((0, 0), (0, width - learnt.shape[1])))
    batch = ours(ids, learnt) | {"label": np.asarray(inputs["label"], np.int32)}
    other = kto.mismatched(jax.tree.map(jnp.asarray, batch))
    wanted = np.asarray(inputs["KL_input_ids"])
    np.testing.assert_array_equal(np.where(other["segments"] > 0, other["tokens"], 257)[:, : wanted.shape[1]], wanted)
    theirs = trainer.compute_loss(trainer.model, inputs)
    objective = kto.make(model, beta=0.3, **weights)
    assert objective.loss(roles, batch, None)["kl"][0] > 0
    compare(theirs, trainer.model, objective, roles, batch)


def of_torch(path, rows):
    """(model, sum of log p, mean of log p, mean over all tokens of the chosen) by transformers, of 2B rows of ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    logits = model(torch.tensor(rows["tokens"]), attention_mask=torch.tensor(rows["segments"])).logits
    each = logits.log_softmax(-1).gather(-1, torch.tensor(rows["targets"]).long()[..., None])[..., 0]
    mask = torch.tensor(rows["mask"])
    total, half = (each * mask).sum(-1), len(mask) // 2
    return model, total, total / mask.sum(-1), total[:half].sum() / mask[:half].sum()


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_without_a_reference(name, folder):
    """TRL's own functions on log-probabilities of transformers. ORPO's likelihood term is the paper's: TRL's counts the
    prompt's tokens too."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    both = [(p, a) for side in ("chosen", "rejected") for p, a in zip(PAIRS["prompt"], PAIRS[side])]
    texts = [[*p.encode(), *a.encode(), 256] for p, a in both]
    starts = [len(p.encode()) for p in PAIRS["prompt"]] * 2
    ids = np.array([t + [257] * (40 - len(t)) for t in texts])
    learnt = np.array([[int(n <= i < len(t)) for i in range(40)] for n, t in zip(starts, texts)])
    rows = ours(ids, learnt)
    torch_model, total, mean, nll = of_torch(folder / "policy", rows)
    own = SimpleNamespace(
        alpha=0.0, beta=0.3, loss_type=name if name == "simpo" else "sigmoid", label_smoothing=0.0, simpo_gamma=0.7,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    model, roles = roles_of(folder)
    if name == "orpo":
        losses, *_ = ORPOTrainer.odds_ratio_loss(own, *mean.chunk(2))
        theirs, objective = -mean.chunk(2)[0].mean() - losses.mean(), orpo.make(model, beta=0.3)
    elif name == "simpo":
        losses, *_ = CPOTrainer.cpo_loss(own, *mean.chunk(2))
        theirs, objective = losses.mean(), simpo.make(model, beta=0.3, gamma=0.7)
    else:
        losses, *_ = CPOTrainer.cpo_loss(own, *total.chunk(2))
        theirs, objective = losses.mean() - 0.5 * nll, cpo.make(model, beta=0.3, sft_weight=0.5)
    compare(theirs, torch_model, objective, roles, sides(rows))


def test_rankings_against_choix():
    """Complete rankings of four answers, and the best one of four, whose other three share the last rank."""
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=4)
    repeated = jnp.asarray(np.tile(scores, (5, 1)), jnp.float32)
    orders = [rng.permutation(4) for _ in range(5)]
    ranks = jnp.asarray([np.argsort(order) for order in orders])
    wanted = choix.log_likelihood_rankings([tuple(map(int, order)) for order in orders], scores)
    np.testing.assert_allclose(ranking.order_logp(repeated, ranks).sum(), wanted, rtol=1e-5)
    best = [int(order[0]) for order in orders]
    ranks = jnp.asarray([[1 if i == first else 2 for i in range(4)] for first in best])
    sets = [(first, tuple(i for i in range(4) if i != first)) for first in best]
    wanted = choix.log_likelihood_top1(sets, scores)
    np.testing.assert_allclose(ranking.order_logp(repeated, ranks).sum(), wanted, rtol=1e-5)


def test_reward(folder, tmp_path):
    """With margins and the term that centers rewards."""
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    torch.manual_seed(2)
    theirs = load(folder / "policy", num_labels=1)
    trainer = trl.RewardTrainer(
        theirs, settings(trl.RewardConfig, tmp_path, center_rewards_coefficient=0.1),
        train_dataset=Dataset.from_dict(PAIRS | {"margin": [0.0, 0.5, 1.0, -0.2]}), processing_class=tokenizer(),
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch = sides(ours(inputs["input_ids"], inputs["attention_mask"]))
    for side in batch.values():
        side["margin"] = np.asarray(inputs["margin"], np.float32)
    model, roles = roles_of(folder)
    head = heads.find("scalar")(model.config, None).replace(w=jnp.asarray(theirs.score.weight.detach().numpy()[0]))
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    roles = {"policy": roles["policy"] | {"head": head}}
    compare(loss, trainer.model, reward.make(model, center=0.1), roles, batch)


@pytest.mark.parametrize("adapter", [False, True])
def test_an_exported_reward_model_scores_the_same(adapter, tmp_path):
    """In transformers, as one folder and as a PEFT adapter on its base."""
    model, params = random_model(TINY)
    base = export.export_hf(model, params, tokenizers.load("bytes"), tmp_path / "base", check=False) == 0
    if adapter:
        params = lora.make(rank=2, where=".*attn/w[qv]", init="pissa")(params, model.specs, jax.random.key(1))
    w = jax.random.normal(jax.random.key(2), (model.config.embed,))
    params["head"] = heads.find("scalar")(model.config, None).replace(w=w)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    if adapter:
        peft_write.write(tmp_path / "out", model, params, str(tmp_path / "base"))
        theirs = peft.PeftModel.from_pretrained(load(tmp_path / "base", num_labels=1), str(tmp_path / "out"))
    else:
        export.export_hf(model, params, tokenizers.load("bytes"), tmp_path / "out")
        theirs = load(tmp_path / "out")
    assert base
    tokens = np.random.default_rng(0).integers(0, 250, (1, 20))
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(tokens)).logits[0, 0].item()
    x = model.hidden(params, jnp.asarray(tokens)).x
    np.testing.assert_allclose(heads.at_end(params["head"], x, jnp.ones((1, 20)))[0], wanted, rtol=1e-5)
