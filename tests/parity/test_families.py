"""Logits, losses and gradients against transformers, for every family on random tiny weights, and one real model."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from common.errors import UserError  # noqa: E402
from data.text.chat import render  # noqa: E402
from data.text.formats import load as load_tokenizer  # noqa: E402
from model.io import export  # noqa: E402
from model.io.pretrained import open_pretrained  # noqa: E402
from model.net.transformer import Transformer  # noqa: E402
from model.peft import lora  # noqa: E402  # noqa: E402

pytestmark = pytest.mark.parity

TINY = dict(
    vocab_size=272, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
DYNAMIC = dict(rope_scaling=dict(rope_type="dynamic", factor=4.0))
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
GRIFFIN = TINY | dict(num_hidden_layers=5, num_key_value_heads=1, attention_window_size=8)
GRIFFIN |= dict(use_cache=False, pad_token_id=None)  # a padding token has no gradient
GPT2 = dict(vocab_size=272, n_embd=32, n_layer=3, n_head=4, n_positions=64)
CASES = {
    "llama": ("Llama", TINY),
    "llama-tied-mha": ("Llama", TINY | dict(tie_word_embeddings=True, num_key_value_heads=4, head_dim=12)),
    "llama-gelu": ("Llama", TINY | dict(hidden_act="gelu", rope_theta=5e5)),
    "linear": ("Llama", TINY | dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "dynamic": ("Llama", TINY | DYNAMIC),
    "dynamic-beyond": ("Llama", TINY | DYNAMIC | dict(max_position_embeddings=24)),
    "llama3": ("Llama", TINY | dict(rope_scaling=dict(rope_type="llama3", **LLAMA3), head_dim=32)),
    "yarn": ("Llama", TINY | dict(rope_scaling=YARN, head_dim=32)),
    "yarn-mscale": ("Llama", TINY | dict(rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.7), head_dim=32)),
    "mistral": ("Mistral", TINY | dict(sliding_window=8)),
    "mistral-full": ("Mistral", TINY | dict(sliding_window=None)),
    "qwen2": ("Qwen2", TINY | dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2", TINY | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", TINY | dict(head_dim=16)),
    "griffin": ("RecurrentGemma", GRIFFIN),
    "griffin-wide": ("RecurrentGemma", GRIFFIN | dict(lru_width=48, attention_bias=True, num_hidden_layers=3)),
    "hawk": ("RecurrentGemma", GRIFFIN | dict(block_types=("recurrent",), num_hidden_layers=2)),
    "gpt2": ("GPT2LMHead", GPT2),
    "gpt2-untied": ("GPT2LMHead", GPT2 | dict(tie_word_embeddings=False, n_inner=40)),
}  # fmt: skip


def peer(case):
    """A transformers model with every parameter random, norms and biases too."""
    name, kwargs = CASES[case]
    config = getattr(transformers, name.removesuffix("LMHead") + "Config")(**kwargs)
    model = getattr(transformers, f"{name}Model" if name == "GPT2LMHead" else f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim > 1 else 0.2))
    return model


def open_ours(folder):
    pretrained = open_pretrained(folder)
    model = Transformer(pretrained.config)
    return model, pretrained.load(model.specs)


def close(ours, theirs, tolerance, what):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    delta = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what}: {delta:.1e}")
    assert delta <= tolerance, what


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case, tmp_path):
    theirs = peer(case)
    theirs.save_pretrained(tmp_path)
    model, params = open_ours(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 272, (2, 40))
    ids = torch.from_numpy(tokens)

    out = theirs(ids, labels=ids)
    close(jax.jit(model)(params, tokens), out.logits, 1e-4, f"{case} logits")

    def loss(params):
        logps = jax.nn.log_softmax(model(params, tokens)[:, :-1])
        return -jnp.take_along_axis(logps, tokens[:, 1:, None], 2).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    close(value, out.loss, 1e-5, f"{case} loss")
    out.loss.backward()
    named = dict(theirs.named_parameters())
    zero = dict(export.tensors(model, jax.tree.map(jnp.zeros_like, grads)))  # -1 where a family stores scales less one
    ours = {name: x - zero[name] for name, x in export.tensors(model, grads)}
    assert set(ours) == set(named)
    worst = max(np.abs(ours[n] - p.grad.numpy()).max() / np.abs(p.grad.numpy()).max() for n, p in named.items())
    print(f"{case} gradients: {worst:.1e}")
    assert worst < 5e-4


@pytest.mark.parametrize(
    "case", ["llama-tied-mha", "llama3", "yarn", "mistral", "qwen2-window", "qwen3", "griffin", "gpt2-untied"]
)
def test_export_opens_in_transformers(case, tmp_path):
    tokenizer = load_tokenizer("bytes")
    peer(case).save_pretrained(tmp_path / "in")
    model, params = open_ours(tmp_path / "in")
    params = jax.jit(lambda p, k: lora.make(rank=4)(p, model.specs, k))(params, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01, params)  # B starts at zero
    delta = export.export_hf(model, params, tokenizer, tmp_path / "out")
    assert delta < 1e-5

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    tokens = np.random.default_rng(0).integers(0, 272, (2, 40))
    close(model(params, tokens), theirs(torch.from_numpy(tokens)).logits, 1e-4, f"{case} exported")


# --- one real model ---

TEXT = (
    "The sea covers most of the Earth. It holds salt water, and its tides follow the Moon. "
    "People have sailed it for thousands of years, to trade, to fish, and to find out what lies beyond it."
)


@pytest.fixture(scope="module")
def smollm2():
    try:
        pretrained = open_pretrained("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))
    model = Transformer(pretrained.config)
    return pretrained, model, pretrained.load(model.specs)


def test_dequantized_tensors_are_those_of_transformers(smollm2):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    pretrained, _, _ = smollm2
    processor = LlamaTensorProcessor(pretrained.source.hf_config)
    reader = {t.name: t for t in gguf.GGUFReader(pretrained.tokenizer_source).tensors}
    everything = (slice(None),) * 2
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.7.attn_k.weight", "blk.29.ffn_down.weight"):
        wanted = processor.process(gguf.dequantize(reader[name].data, reader[name].tensor_type), name).weights
        np.testing.assert_array_equal(pretrained.source.read(name, everything), wanted)


@pytest.mark.slow
def test_smollm2_speaks_as_in_transformers(smollm2):
    pretrained, model, params = smollm2
    config = transformers.LlamaConfig(**pretrained.source.hf_config)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    state = {name: torch.from_numpy(x.copy()) for name, x in export.tensors(model, params)}
    theirs.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its buffer is on the meta device
    tokenizer = load_tokenizer(pretrained.tokenizer_source)

    tokens = np.array([tokenizer.encode(TEXT)])
    out = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    logits = jax.jit(model)(params, tokens)
    close(logits, out.logits, 1e-5, "smollm2 logits")
    logps = jax.nn.log_softmax(logits[0, :-1])
    close(-logps[np.arange(len(logps)), tokens[0, 1:]].mean(), out.loss, 1e-5, "smollm2 loss")

    prompt = render([{"role": "user", "content": "What is the capital of France?"}], tokenizer, True)
    ids = tokenizer.encode(prompt, special=True)
    answer = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=2)[0, len(ids) :]
    assert greedy(model, params, ids, 16, 2) == answer.tolist()
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def greedy(model, params, ids, most, eos):
    """The likeliest continuation, each token by a whole forward pass."""
    step, new = jax.jit(model), []
    while len(new) < most and eos not in new:
        row = np.zeros((1, len(ids) + most), np.int32)
        row[0, : len(ids) + len(new)] = ids + new
        new.append(int(step(params, row)[0, len(ids) + len(new) - 1].argmax()))
    return new
