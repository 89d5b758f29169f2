"""Adapters of PEFT and ours: the same logits and gradients for the same folder, in both directions."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from common.errors import UserError  # noqa: E402
from model import weights  # noqa: E402
from model.io import peft_folder, peft_read, peft_write  # noqa: E402
from tests.parity.test_families import close, open_ours, peer  # noqa: E402

pytestmark = pytest.mark.parity
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = dict(rank_pattern={"layers.1.self_attn.q_proj": 6, "down_proj": 2}, alpha_pattern={"0.mlp.up_proj": 3})
DOWN = "down_proj"
TIED = ["q_proj", "embed_tokens"]
lora = lambda **k: peft.LoraConfig(**dict(r=4, lora_alpha=8, target_modules=ALL) | k)
CASES = {
    "lora": ("llama", lora()),
    "lora-rslora-patterns": ("llama", lora(use_rslora=True, **PATTERNS)),
    "lora-some-layers": ("qwen2", lora(layers_to_transform=[0, 2], layers_pattern="layers")),
    "lora-orthogonal": ("llama", lora(init_lora_weights="orthogonal")),
    "lora-embeddings": ("llama", lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "lora-tied": ("llama-tied-mha", lora(target_modules=TIED, ensure_weight_tying=True)),
    "lora-tied-lookup": ("llama-tied-mha", lora(target_modules=TIED)),
    "lora-tied-head": ("llama-tied-mha", lora(target_modules=["q_proj", "lm_head"])),
    "lora-gpt2": ("gpt2-untied", lora(target_modules=["c_attn", "c_fc", "mlp.c_proj"], fan_in_fan_out=True)),
    "dora": ("llama", lora(use_dora=True, **PATTERNS)),
    "dora-qwen2": ("qwen2", lora(use_dora=True)),
    "dora-tied": ("llama-tied-mha", lora(target_modules=TIED, use_dora=True, ensure_weight_tying=True)),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "v_proj", DOWN], feedforward_modules=[DOWN])),
    "oft": ("llama", peft.OFTConfig(oft_block_size=8, target_modules=ALL)),
    "oft-exact": ("qwen3", peft.OFTConfig(oft_block_size=4, target_modules=ALL, use_cayley_neumann=False)),
    "prefix": ("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prefix-gpt2": ("gpt2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prefix-window": ("mistral", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prompt": ("llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prompt-gpt2": ("gpt2", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
}


def adapted(case, folder):
    """A PEFT model with every adapter parameter moved, saved with its base; and the base and the adapter, opened."""
    family, config = CASES[case]
    base = peer(family)
    base.save_pretrained(folder / "base")
    theirs = peft.get_peft_model(base, copy.deepcopy(config)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.02 if "oft" in name else 0.1))
    theirs.save_pretrained(folder / "adapter")
    model, params = open_ours(folder / "base")
    return theirs, model, params, peft_read.read(folder / "adapter")(params, model.specs, jax.random.key(0))


def logits_of(theirs, tokens):
    return theirs(input_ids=torch.from_numpy(tokens)).logits[:, -tokens.shape[1] :]


@pytest.mark.parametrize("case", list(CASES))
def test_logits_and_gradients(case, tmp_path):
    theirs, model, params, ours = adapted(case, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 272, (2, 20))
    wanted = logits_of(theirs, tokens)
    without = np.asarray(jax.jit(model)(params, tokens))
    assert np.abs(without - wanted.detach().numpy()).max() > 1e-3  # the adapter does something
    close(jax.jit(model)(ours, tokens), wanted, 1e-5, f"{case} logits")

    # The gradient along one direction, that of the adapters themselves, says whether all of them agree.
    mask = weights.trainable(ours, "adapters")
    train, frozen = weights.partition(ours, mask)
    loss = lambda t: jnp.square(model(weights.combine(t, frozen), tokens)).mean()
    grads = jax.jit(jax.grad(loss))(train)
    along = sum(float((g * p).sum()) for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(train)))
    wanted.square().mean().backward()
    moving = [p for p in theirs.parameters() if p.requires_grad]
    expected = sum(float((p.grad * p).sum()) for p in moving if p.grad is not None)
    print(f"{case} gradient: {along:.6g} {expected:.6g}")
    np.testing.assert_allclose(along, expected, rtol=2e-4)


@pytest.mark.parametrize("case", list(CASES))
def test_what_we_write_opens_in_peft(case, tmp_path):
    theirs, model, params, ours = adapted(case, tmp_path)
    peft_write.write(tmp_path / "again", model, ours)
    tokens = np.random.default_rng(1).integers(0, 272, (2, 20))
    written = logits_of(opened(tmp_path / "again", tmp_path), tokens)
    close(logits_of(theirs, tokens).detach(), written, 1e-5, f"{case} written")
    again = peft_read.read(tmp_path / "again")(params, model.specs, jax.random.key(0))
    close(model(again, tokens), written, 1e-5, f"{case} read again")


BOTH = ["embed_tokens", "lm_head"]
ia3 = lambda **k: peft.IA3Config(**dict(target_modules=["k_proj", "v_proj", DOWN], feedforward_modules=[DOWN]) | k)
READ = {
    "dora in one layer": ("llama", lora(use_dora=True, layers_to_transform=[1], layers_pattern="layers")),
    "a layer by number": ("llama", lora(layers_to_transform=2)),
    "dora with ranks": ("qwen2", lora(use_dora=True, use_rslora=True, layers_to_transform=[0, 2], **PATTERNS)),
    "all-linear": ("llama", lora(target_modules="all-linear")),
    "a regex": ("llama", lora(target_modules=r"model\.layers\.(0|2)\..*\.(q|v|up)_proj")),
    "excluded by name": ("llama", lora(exclude_modules=["1.self_attn.q_proj", "down_proj"])),
    "excluded by a regex": ("llama", lora(exclude_modules=r".*\.0\..*")),
    "alpha by a regex": (
        "llama",
        lora(alpha_pattern={r"^model\.layers\.\d+\.mlp\..*": 3, "layers.1.self_attn.q_proj": 5}),
    ),
    "copies of both tables": ("llama", lora(target_modules=["q_proj"], modules_to_save=BOTH)),
    "copies of norms and of a matrix": (
        "qwen3",
        lora(target_modules=["q_proj"], modules_to_save=["norm", "up_proj", "q_norm"]),
    ),
    "copies in gpt2": ("gpt2", lora(target_modules=["c_attn"], modules_to_save=["wpe", "ln_1", "mlp.c_proj"])),
    "a copy of the tied table": ("llama-tied-mha", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "a copy of the tied head": ("llama-tied-mha", lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "copies of both uses of a table": ("llama-tied-mha", lora(target_modules=["q_proj"], modules_to_save=BOTH)),
    "copies that stay tied": (
        "llama-tied-mha",
        lora(target_modules=["q_proj"], modules_to_save=BOTH, ensure_weight_tying=True),
    ),
    "every bias": ("qwen2", lora(bias="all")),
    "biases of the adapted": (
        "gpt2",
        lora(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, bias="lora_only"),
    ),
    "tokens": ("llama", lora(target_modules=["q_proj"], trainable_token_indices=[3, 7, 270])),
    "tokens of a tied table": ("llama-tied-mha", lora(target_modules=["q_proj"], trainable_token_indices=[3, 7])),
    "tokens by name": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5], "lm_head": [5, 6]}),
    ),
    "drawn as eva draws": ("llama", lora(init_lora_weights="gaussian", lora_dropout=0.3)),
    "pissa": ("llama", lora(init_lora_weights="pissa", use_rslora=True, **PATTERNS)),
    "pissa, dora, gpt2": (
        "gpt2",
        lora(init_lora_weights="pissa", use_dora=True, target_modules=["c_fc", "mlp.c_proj"], fan_in_fan_out=True),
    ),
    "olora": ("llama", lora(init_lora_weights="olora", layers_to_transform=[0, 2], **PATTERNS)),
    "mica": ("llama", lora(init_lora_weights="mica", target_modules=["q_proj", "embed_tokens"])),
    "velora": ("llama", lora(velora_config=peft.VeloraConfig(num_groups=2))),
    "monteclora": ("llama", lora(monteclora_config=peft.MontecloraConfig())),
    "ia3 with biases": ("qwen2", ia3()),
    "ia3 of all, with copies": (
        "llama",
        ia3(target_modules=ALL, feedforward_modules=[DOWN, "o_proj"], modules_to_save=["lm_head"]),
    ),
    "ia3 in gpt2": (
        "gpt2",
        ia3(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "oft with copies": (
        "llama",
        peft.OFTConfig(oft_block_size=8, target_modules=ALL, layers_to_transform=[1], modules_to_save=["norm"]),
    ),
    "oft by rank": ("llama", peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"])),
    "p-tuning": (
        "llama",
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    ),
    "prefix with projection": (
        "llama",
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
        ),
    ),
}
CASES |= READ  # for `adapted`; the tests above walk what was there before


@pytest.mark.parametrize("case", READ)
def test_what_peft_writes(case, tmp_path):
    _, model, params, ours = adapted(case, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 272, (2, 20))
    tokens[0, :4] = [3, 7, 5, 270]
    wanted = logits_of(opened(tmp_path / "adapter", tmp_path), tokens).detach()
    assert np.abs(np.asarray(model(params, tokens)) - wanted.numpy()).max() > 1e-3  # the adapter does something
    close(model(ours, tokens), wanted, 1e-4 if "pissa" in case else 1e-5, case)  # two libraries' singular vectors


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_adapters_that_need_a_base_that_is_not_there(init, tmp_path):
    adapted("lora", tmp_path)
    config = json.loads((path := tmp_path / "adapter" / peft_folder.CONFIG).read_text())
    path.write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(UserError, match=f"{init}.*changes the base model's weights.*save"):
        peft_read.read(tmp_path / "adapter")


CONFIGS = {
    "LORA": peft.LoraConfig, "IA3": peft.IA3Config, "OFT": peft.OFTConfig, "P_TUNING": peft.PromptEncoderConfig,
    "PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig,
}  # fmt: skip


def test_every_field_of_every_config_is_in_a_table():
    """Of the methods that are read; and no other is in a table."""
    assert CONFIGS.keys() == peft_folder.USED.keys()
    fields = {kind: {f.name for f in dataclasses.fields(config)} for kind, config in CONFIGS.items()}
    ours = peft_folder.IRRELEVANT | peft_folder.REFUSED
    for kind, names in fields.items():
        assert peft_folder.USED[kind] <= names and not peft_folder.USED[kind] & peft_folder.IRRELEVANT
        assert not names - ours - peft_folder.USED[kind], kind
    assert ours <= set().union(*fields.values()) and not peft_folder.IRRELEVANT & peft_folder.REFUSED


def opened(adapter, folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    return peft.PeftModel.from_pretrained(base, adapter).eval()
