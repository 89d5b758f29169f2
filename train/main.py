"""The flow of a run, from a config to a trained, resumed, measured model.

    python -m train.main --config=configs/sft/tiny.py --workdir=runs/tiny [--config.key=value ...] [--plan]

--plan shows what the run would hold; --debug examines one step and the batch of it; --profile=N traces N steps.

Exit codes: 0 done, 2 the input must change, 70 the numbers broke down, 75 preempted: run the same command again.
"""

import contextlib
import sys
import time
from typing import Any

from common import cli, exits
from common.errors import UserError
from configs import schema


@cli.command
def main(argv: list[str]) -> int:
    loaded = schema.load(argv, flags={"plan": False, "debug": False, "profile": 0})
    if loaded.flags["plan"]:
        return show_plan(loaded.config)
    if loaded.flags["debug"]:
        from train import debug

        return debug.run(loaded.config, loaded.workdir)
    if not loaded.workdir:
        raise UserError("no run folder", "--workdir", "name one, as --workdir=runs/first; the same one resumes")
    return run(loaded)


def show_plan(cfg: Any) -> int:
    """Prints what the run would hold and cost. No device is touched: -1 in the mesh counts as 1."""
    from train import plan

    plan.show(cfg, planned(cfg))
    return 0


def planned(cfg: Any) -> Any:
    """The train.init.Plan of a config, on abstract devices."""
    from model import build
    from train import init, inputs, mesh

    start = inputs.pretrained(cfg)
    model = build.model(cfg, start, inputs.vocabulary(cfg, start))
    return init.plan(cfg, model, mesh.abstract_mesh(cfg.mesh))


def run(loaded: Any) -> int:
    """Trains what a validated config says, in its folder, from the newest whole checkpoint on."""
    began = time.perf_counter()
    import flax.linen as nn
    import jax

    from model import build
    from train import init, inputs, plan
    from train.keep import flags, hosts
    from train.keep.checkpoint import Checkpointer
    from train.keep.clock import Clock
    from train.keep.metrics import Metrics
    from train.keep.runs import RunDir
    from train.keep.trace import Trace
    from train.mesh import RULES, make_mesh
    from train.monitor import Judge
    from train.step import compile_step

    cfg = loaded.config
    flags.apply(cfg.xla_preset)
    flags.fake_devices()
    flags.trim_after_compiling()
    hosts.connect()
    with contextlib.ExitStack() as closing:
        enter = closing.enter_context
        folder = enter(RunDir(loaded.workdir, schema.to_dict(cfg), loaded.overrides, loaded.path))
        metrics = enter(Metrics(folder.path / "metrics.jsonl", cfg.steps, cfg.tracker, folder.config))
        with metrics.timer("init", since=began):
            # Model, data and the first state. Shapes and shardings are known before any array exists.
            mesh = make_mesh(cfg.mesh)
            enter(jax.set_mesh(mesh))
            enter(nn.logical_axis_rules(RULES))
            start = inputs.pretrained(cfg)
            tokenizer = inputs.tokenizer(cfg, start, folder.path)
            source, heldout = inputs.sources(cfg, tokenizer, mesh)
            model = build.model(cfg, start, tokenizer.vocab_size)
            planned = init.plan(cfg, model, mesh)
            inputs.check(planned.objective, source.loader.kind)
            plan.show(cfg, planned, folder.path / "cost.json")
            state = init.first_state(cfg, planned, start)

            # Where to start: 1. this run's newest whole checkpoint, 2. `init`, 3. at random.
            place, first = folder.home / "ckpt", lambda: (metrics.sync(), folder.publish())
            ckpt = enter(contextlib.closing(Checkpointer(place, cfg.ckpt, cfg.allow, metrics.event, first)))
            state = ckpt.restore(state, source)
            done = int(state.step)
            metrics.rewind(done)

        judge = Judge(cfg, planned, heldout, tokenizer, metrics)
        step = compile_step(planned, cfg.accum)
        clock = Clock(cfg, planned)
        trace = enter(contextlib.closing(Trace(loaded.flags.get("profile", 0), folder.path / "profile")))
        if done == 0:
            judge(state, 0)

        # Step n reads batch n - 1 and the state: a resume does what an uninterrupted run would have done.
        while done < cfg.steps:
            with metrics.timer("data"):
                batch, counts = source.next(done)
            with metrics.timer("step" if clock.steps else "compile"):
                state, sums = step(state, batch)
                clock.tick(sums, counts)
            with clock.paused():
                trace.tick(clock.steps, sums)
            done += 1
            last = done == cfg.steps
            if done % cfg.log_every == 0 or last:
                with metrics.timer("step"):
                    metrics.write(done, "train", **clock.line(done, source.seen))
            with metrics.timer("step"):  # where the time of a step goes: its dispatch returned at once
                bad_steps = clock.bad_steps()
            if bad_steps >= cfg.optim.max_bad_steps:
                metrics.end(f"{cfg.optim.max_bad_steps} non-finite steps in a row", cfg.chip, exit_code=exits.BROKEN)
                return exits.BROKEN
            if last or (cfg.eval_every and done % cfg.eval_every == 0):
                with clock.paused():
                    judge(state, done)
            stop = not last and folder.stop_requested(done)
            with clock.paused(), metrics.timer("checkpoint"):
                ckpt.maybe_save(done, state, source, force=last or stop)
                if stop or last:
                    ckpt.wait()
            if stop:
                metrics.end(
                    "stopped by a signal; the same command goes on from here", cfg.chip, exit_code=exits.PREEMPTED
                )
                return exits.PREEMPTED
            if last:
                metrics.end("done", cfg.chip, **clock.totals(source.seen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
