"""train.main with an objective that no config can name: `python -m tests.toy [arguments of train.main]`.

The policy samples, learns from a frozen teacher of another shape what to say, and goes on with each rollout for three
steps. KILL="SIGNAL:STEP" in the environment sends this process a signal before the given step.
"""

import os
import sys

import jax
import jax.numpy as jnp

from model import build
from train import main
from train.init import Blueprint
from train.objectives import Objective, Role
from train.source import Batches

SERVES = 3  # steps a rollout


def online(model) -> Objective:
    """On-policy distillation: the reverse KL divergence from the teacher, on what the policy has sampled."""
    from tests.helpers.steps import Random, config

    small = {"model.layers": 1, "model.embed": 32, "model.heads": 2, "model.mlp": 48}
    teacher = build.model(config(**small), None, model.config.vocab_size)

    def loss(roles, batch, key):
        seen = batch["tokens"], batch["positions"], batch["segments"]
        own, other = (jax.nn.log_softmax(net(p, *seen)) for net, p in (
            (model, roles["policy"]), (teacher, jax.lax.stop_gradient(roles["teacher"]))))  # fmt: skip
        kl = ((jnp.exp(own) * (own - other)).sum(-1) * batch["mask"]).sum()
        return {"loss": (kl, batch["mask"].sum())}

    roles = {"policy": Role("train"), "teacher": Role("frozen", start=Random(teacher, 7), model=teacher)}
    return Objective(loss, "lm", roles, source=Rollouts)


class Rollouts:
    """Batches of the data whose tokens the policy has drawn again; each serves SERVES steps."""

    def __init__(self, data: Batches, blueprint: Blueprint):
        self.data, self.model = data, blueprint.model
        self.seen = {"tokens": 0, "targets": 0, "policy/tokens": 0, "policy/targets": 0}
        self.kill, self.at = map(int, os.environ.get("KILL", "0:-1").split(":"))
        self.draw = jax.jit(self._draw)

    def _draw(self, policy, batch, key):
        logits = self.model(policy, batch["tokens"], batch["positions"], batch["segments"])
        return batch | {"tokens": jax.random.categorical(key, logits).astype(jnp.int32)}

    def next(self, state, step):
        if step == self.at:
            os.kill(os.getpid(), self.kill)
        if step % SERVES == 0:
            prompts, self.counts = self.data.batch(step // SERVES)
            self.batch = self.draw(state.role("policy"), prompts, state.key)
        n = self.counts["tokens"]
        sampled = {"policy/tokens": n, "policy/targets": n} if step % SERVES == 0 else {}
        counts = self.counts | sampled
        self.seen = {k: v + counts.get(k, 0) for k, v in self.seen.items()}
        return self.batch, counts

    def resumable(self, step):
        return step % SERVES == 0

    def state_dict(self):
        return self.data.state_dict() | {"seen": self.seen}

    def load_state_dict(self, state):
        self.data.load_state_dict(state)
        self.seen = state["seen"]


def register() -> None:
    """The objective in place of the one that a config names."""
    find = build.find
    build.find = lambda package, cfg: online if package == "train.objectives" else find(package, cfg)


if __name__ == "__main__":
    register()
    sys.exit(main.main(sys.argv[1:]))
