"""Runs training from a validated config: opens or resumes the run, then trains, evaluates and saves checkpoints."""

import contextlib
import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax

from common import exits
from common.types import Config
from configs import schema
from model import build
from train import init, inputs, plan
from train.keep import flags, hosts
from train.keep.checkpoint import Checkpointer
from train.keep.clock import Clock
from train.keep.metrics import Metrics
from train.keep.runs import RunDir
from train.keep.trace import Trace
from train.mesh import RULES, make_mesh
from train.monitor import Monitor
from train.objectives import Pair
from train.source import Batch, Source
from train.state import TrainState
from train.step import compile_step


@dataclasses.dataclass
class Session:
    """Everything that the training loop uses during one launch of a run. A run that is stopped and resumed has several
    launches."""

    cfg: Config
    folder: RunDir
    metrics: Metrics
    source: Source
    state: TrainState
    ckpt: Checkpointer
    monitor: Monitor
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Pair]]]
    clock: Clock
    trace: Trace
    rows: int  # training rows per epoch


def run(loaded: schema.Loaded, began: float) -> int:
    """Trains in the run folder, starting from its newest complete checkpoint; returns the exit code.

    `began` is time.perf_counter() when the launch began, before jax was imported.
    """
    flags.apply(loaded.config.xla_preset)
    flags.fake_devices()
    flags.trim_after_compiling()
    hosts.connect()
    inputs.follow_epochs(loaded.config)
    with contextlib.ExitStack() as closing, hosts.watched():
        return train(open_session(loaded, closing, began))


def open_session(loaded: schema.Loaded, closing: contextlib.ExitStack, began: float) -> Session:
    """Opens the model and the data, and creates or restores the state to start from. All shapes and shardings are
    planned before any array is created."""
    cfg, enter = loaded.config, closing.enter_context
    assert loaded.workdir, "the command line has been checked"
    folder = enter(RunDir(loaded.workdir, schema.to_dict(cfg), loaded.overrides, loaded.path))
    metrics = enter(Metrics(folder.path / "metrics.jsonl", cfg.steps, cfg.tracker, folder.config, cfg.ckpt.on_error))
    with metrics.timer("init", since=began):
        tasks = inputs.tasks(cfg)
        mesh = make_mesh(cfg.mesh)
        enter(jax.set_mesh(mesh))
        enter(nn.logical_axis_rules(RULES))
        start = inputs.pretrained(cfg)
        tokenizer = inputs.tokenizer(cfg, start)
        data, heldout = inputs.sources(cfg, tokenizer, mesh)
        inputs.keep_tokenizer(tokenizer, folder.path, data.loader.system)
        blueprint = init.blueprint(cfg, build.model(cfg, start, tokenizer.vocab_size), mesh)
        source = inputs.source(blueprint, data, cfg.steps)
        plan.show(cfg, blueprint, folder.path / "cost.json")
        state = init.first_state(cfg, blueprint, start)

        def before_a_save() -> None:
            metrics.sync()
            folder.publish()

        where = folder.home / "ckpt"
        ckpt = enter(Checkpointer(where, cfg.ckpt, cfg.allow, metrics.event, before_a_save, folder.config))
        # If this run has a complete checkpoint, the newest one replaces the state that was just created.
        state = ckpt.restore(state, source)
        metrics.rewind(int(state.step))
    monitor = Monitor(cfg, blueprint, heldout, tokenizer, metrics, tasks)
    ckpt.passed = monitor.passed
    trace = enter(contextlib.closing(Trace(loaded.flags.get("profile", 0), folder.path / "profile")))
    step = compile_step(blueprint, cfg.accum)
    clock, rows = Clock(cfg, blueprint), sum(data.loader.sizes)
    return Session(cfg, folder, metrics, source, state, ckpt, monitor, step, clock, trace, rows)


def train(s: Session) -> int:
    """The training loop. Each step depends only on the state and on its batch, so a resumed run gives the same result
    as an uninterrupted run. Returns the exit code."""
    cfg, metrics, clock, source = s.cfg, s.metrics, s.clock, s.source
    done, clock.bad = int(s.state.step), int(s.state.bad)
    verdict = s.monitor.verdict(done) if done else s.monitor(s.state, 0)
    if cfg.floors and done == 0:
        s.ckpt.maybe_save(0, s.state, source, force=True)
    while done < cfg.steps and not verdict:
        with metrics.timer("data"):
            batch, counts = source.next(s.state, done)
        with metrics.timer("step" if clock.steps else "compile"):
            s.state, sums = s.step(s.state, batch)
            clock.tick(sums, counts)
        with clock.paused():
            s.trace.tick(clock.steps, sums)
        done += 1
        metrics.step = done
        last = done == cfg.steps
        if done % cfg.log_every == 0 or last:
            with metrics.timer("step"):
                epoch = done * cfg.data.batch_size / s.rows
                metrics.write(done, "train", epoch=epoch, **clock.line(done, source.seen))
        with metrics.timer("step"):  # steps are dispatched asynchronously; this call waits for the device
            bad_steps = clock.bad_steps()
        if bad_steps >= cfg.optim.max_bad_steps:
            metrics.end(f"{cfg.optim.max_bad_steps} non-finite steps in a row", cfg.chip, exit_code=exits.BROKEN)
            return exits.BROKEN
        evaluated = last or bool(cfg.eval_every and done % cfg.eval_every == 0)
        if evaluated:
            with clock.paused():
                verdict = s.monitor(s.state, done)
        resumable = source.resumable(done)
        stop = s.folder.stop_requested(done) and resumable and not last
        with clock.paused(), metrics.timer("checkpoint"):
            if resumable:
                s.ckpt.maybe_save(done, s.state, source, force=last or stop or (evaluated and bool(cfg.floors)))
            if stop or last:
                s.ckpt.wait(must=last)
        if verdict:
            break
        if stop:
            metrics.end("stopped by a signal; the same command resumes here", cfg.chip, exit_code=exits.PREEMPTED)
            return exits.PREEMPTED
    if verdict:
        return below_floor(s, verdict)
    if metrics.finished:
        print(f"all {cfg.steps} steps are done; nothing is left to do")
    else:
        # Reached after the last step, or by resuming a run that was killed between its last checkpoint and this line.
        metrics.end("done", cfg.chip, **clock.totals(source.seen))
    return exits.DONE


def below_floor(s: Session, verdict: str) -> int:
    """Ends a run in which a metric crossed one of the limits in the config's `floors`. Running the same command again
    ends it in the same way. Returns the exit code."""
    s.ckpt.wait()
    step = s.ckpt.last_passed()
    kept = "no step passed" if step is None else f"the last step that passed is kept: {s.ckpt.folder / str(step)}"
    s.metrics.end(f"{verdict}; {kept}", s.cfg.chip, exit_code=exits.BELOW_FLOOR)
    return exits.BELOW_FLOOR
