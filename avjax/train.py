"""The only training loop."""

import collections
import contextlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview

from avjax import config as config_lib
from avjax import (
  evaluate,
  experiment,
  flops,
  initialise,
  memory,
  objects,
  parallel,
  profiling,
  report,
)
from avjax.checkpoint import Checkpoints, RunLock
from avjax.data import pipeline
from avjax.errors import InputError, unknown
from avjax.workdir import Workdir, make_folder, workdir, write_text
from avjax.writer import Writer

# Keys that may change between a run and its continuation: they do not change
# what is computed, only where, how fast and what is shown.
FREE_KEYS = ("log_every", "mesh.", "grad_cache", "checkpoint.", "evals.",
             "data.dir", "data.workers", "data.threads", "data.prefetch",
             "data.files.", "data.object_scores")  # fmt: skip


def train_and_evaluate(
  config: Any, path: Any, *, profile: str = ""
) -> dict[str, float]:
  """Trains the config in a folder, or goes on where that folder stopped.

  Args:
    config: a config of one stage or a staged one (avjax.config.staged).
    path: the run's folder.
    profile: steps of each stage to trace, see avjax.profiling; '' = none.

  Returns:
    The final scores, `<eval>/<metric>`; of the last stage for a staged config.

  Raises:
    InputError: what was asked for is impossible; says which key or file.
    FloatingPointError: a metric is not finite; names the step and metric.
  """
  run = workdir(path)
  if not config.stages:
    return train_stage(config, run, profile)
  scores, previous = {}, None
  for name in config.stages:
    logging.info("stage %s in %s", name, run.stage(name).root)
    stage = config[name].copy_and_resolve_references()
    if stage.init_from == "previous":
      if previous is None:
        raise InputError(
          f"stage {name!r} starts from the one before it, which stages="
          f"{tuple(config.stages)} leave out; name a run with "
          f"--config.{name}.init_from"
        )
      with stage.unlocked():
        stage.init_from = str(previous.root)
    if jax.process_index() == 0:
      initialise.note_stages(run, config.stages)
    previous = run.stage(name)
    more = name != config.stages[-1]
    scores = train_stage(stage, previous, profile, more=more)
  if jax.process_index() == 0:
    report.write_staged(run, config.stages)
    write_text(run.done, json.dumps({"scores": scores}, indent=2) + "\n")
  return scores


def train_stage(
  config: Any, run: Workdir, profile: str = "", *, more: bool = False
) -> dict[str, float]:
  """One stage; see train_and_evaluate. `more` says whether others follow."""
  config = objects.counted(config)
  if run.done.exists():
    check_config(config, run)
    logging.info("%s is finished, nothing to do", run.root)
    return report.final_scores(run)
  make_folder(run.root)
  with RunLock(run.lock):
    check_config(config, run)
    loop = Loop(config, run, profile)
    with loop.signals():
      scores = loop.go()
      if more and loop.agreed():
        logging.info("this stage is done; the same command goes on from there")
        sys.exit(128 + signal.SIGTERM)
      return scores


def check_config(config: Any, run: Workdir) -> None:
  """Saves the resolved config, or compares it with the one saved before.

  A start that failed before its first step does not bind the folder.

  Raises:
    InputError: the folder belongs to a run with another config; lists the
      keys with both values.
  """
  new = config_lib.plain(config)
  begun = run.metrics.exists() and run.metrics.stat().st_size > 0
  if run.config.exists() and (begun or any(run.checkpoints.glob("[0-9]*"))):
    old = config_lib.completed(run.read_config())
    rows = config_lib.differences(old, new)
    rows = [row for row in rows if not row.startswith(FREE_KEYS)]
    if _same_stage(old["init_from"], new["init_from"], run):
      rows = [row for row in rows if not row.startswith("init_from:")]
    if rows:
      raise InputError(
        f"{run.root} holds a run with another config; choose another "
        f"--workdir or the same config. Differences (saved -> asked): "
        f"{'; '.join(rows)}"
      )
  if jax.process_index() == 0:
    text = json.dumps(new, indent=2) + "\n"
    if not run.config.exists() or run.config.read_text() != text:
      write_text(run.config, text)
    names = {h: pipeline.class_names(config.data, h) for h in config.data.heads}
    write_text(run.classes, json.dumps(names, indent=2) + "\n")
    objects.note(config.data, run, begun=begun)


def _same_stage(old: str, new: str, run: Workdir) -> bool:
  """Whether `new` is the stage beside `run`, and `old` one of its name.

  A run's folder may be moved, or named otherwise.
  """
  before, now = pathlib.Path(old), pathlib.Path(new)
  beside = now.resolve().parent == run.root.resolve().parent
  return bool(new) and beside and before.name == now.name


class Loop:
  """The state of one running stage."""

  def __init__(self, config: Any, run: Workdir, profile: str = ""):
    self.config, self.run = config, run
    self.trace = profiling.Trace(profile, run.root / "profile")
    self.interrupted = False
    self.scores: dict[str, float] = {}
    self.scored: dict[str, int] = {}  # evaluation -> its step
    self.skipped, self.first = pipeline.Skipped(), 0
    self.left_out: evaluate.LeftOut = {}

  def go(self) -> dict[str, float]:
    """Restores, trains, evaluates, reports."""
    checkpoint = self.config.checkpoint
    self.check_best()
    self.setup = experiment.build(self.config)
    evaluate.check(self.setup)
    self.checkpoints = Checkpoints(
      self.run.checkpoints,
      keep=checkpoint.keep,
      best=checkpoint.best,
      best_mode=checkpoint.best_mode,
    )
    # ---- 1. restore, else init_from, else random: in this order, so that a
    # restarted fine-tuning never reads the pretrained weights again.
    state, first = self.first_state()
    self.first = first
    self.writer = Writer(self.run, first)
    self.evaluators = evaluate.make_evaluators(
      self.setup, self.run, self.writer, self.left_out
    )
    try:
      if first < self.setup.total_steps:
        state = self.train(state, first)
      self.finish(state)
    finally:
      self.writer.close()
      self.checkpoints.close()
    return self.scores

  def first_state(self) -> tuple[experiment.State, int]:
    """The newest verified checkpoint, or the state that training starts in."""
    setup, config = self.setup, self.config
    if self.checkpoints.steps():
      step, state, extra = self.checkpoints.restore(setup.stored_shapes())
      self.scores = dict(extra.get("scores", {}))
      if jax.process_index() == 0:  # They are those of all processes.
        self.skipped.load(extra.get("skipped", {}))
      self.left_out.update(extra.get("left_out", {}))
      logging.info("resumed from step %d of %s", step, self.run.checkpoints)
      return setup.place(state), step
    state = setup.init_state()
    if config.init_from:
      state = initialise.from_weights(setup, state, self.run)
    else:
      logging.info("init_from is empty: random initialisation")
    if jax.process_index() == 0:
      shown = setup.stored_shapes()["params"]
      table = parameter_overview.get_parameter_overview(
        shown, include_stats=False
      )
      logging.info("parameters\n%s", table)
    return state, 0

  def train(self, state: experiment.State, first: int) -> experiment.State:
    """Steps `first`..total; returns the last state."""
    setup, config = self.setup, self.config
    began = time.perf_counter()
    traced = setup.trace_step()
    step_fn = traced.lower().compile()
    seconds = time.perf_counter() - began
    self.say_costs(flops.of_jaxpr(traced.jaxpr)[1], step_fn, seconds)
    if self.interrupted and jax.process_count() == 1:
      logging.info("stopped before a step; the same command goes on from there")
      sys.exit(128 + signal.SIGTERM)
    batches = pipeline.device_batches(
      pipeline.train_batches(
        config.data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        skipped=self.skipped,
      ),
      parallel.batch_sharding(setup.mesh),
      config.data.prefetch,
    )
    meter = Meter(setup, first)
    save_every = self.interval(config.checkpoint, "checkpoint")
    try:
      for step in range(first + 1, setup.total_steps + 1):
        self.trace.before_step(meter.pending)
        batch, _ = next(batches)
        with profiling.named(step):
          state, metrics = step_fn(state, batch)
        meter.add(step, metrics)
        last, stopping = step == setup.total_steps, self.stopping(step)
        # ---- 2. order within a step: metrics, evaluation, checkpoint. A
        # checkpoint then never holds a state that was not finite, and knows
        # the scores that "best" compares.
        saving = last or stopping or step % save_every == 0
        if last or step % config.log_every == 0 or saving:
          self.writer.scalars(step, meter.flush(step))
        due = self.due_evaluations(step)
        if due:
          with self.kept(step, state, meter):
            self.evaluate(state, step, due)
          meter.pause()
        if saving:
          self.save(step, state)
          meter.pause()
        if stopping and not last:
          self.leave(step)
    finally:
      self.trace.close(meter.pending)
      batches.close()
    return state

  def interval(self, section: Any, what: str) -> int:
    """Steps between two checkpoints or evaluations; 0 = only at the end."""
    steps = int(section.get("every_steps", 0)) or round(
      section.every_epochs * self.setup.steps_per_epoch
    )
    if steps < 0:
      raise InputError(f"{what} interval {steps} is negative")
    return steps or self.setup.total_steps

  def due_evaluations(self, step: int) -> list[str]:
    """Names of the evaluations of this step; all at the end."""
    if step == self.setup.total_steps:
      return list(self.evaluators)
    sections = self.config.evals
    return [
      name
      for name in self.evaluators
      if step % self.interval(sections[name], f"evals.{name}") == 0
    ]

  def evaluate(self, state: Any, step: int, names: list[str]) -> None:
    """Runs evaluations and records their scores."""
    params = self.setup.eval_params(state)
    before, best = self.scores, self.config.checkpoint.best
    self.scores = {
      key: x for key, x in before.items() if key.split("/")[0] not in names
    }
    for name in names:
      values = self.evaluators[name].run(params, step)
      scores = {f"{name}/{key}": float(v) for key, v in values.items()}
      self.writer.scalars(step, scores)
      logging.info("step %d %s", step, report.in_words(scores))
      self.scores.update(scores)
      self.scored[name] = step
      if best.split("/")[0] == name and best not in scores:
        raise unknown("metric in checkpoint.best", best, scores)

  @contextlib.contextmanager
  def kept(
    self, step: int, state: experiment.State, meter: "Meter"
  ) -> Iterator[None]:
    """An evaluation that fails costs no training: the state is saved first.

    Not by several processes, which may not all have failed.
    """
    try:
      yield
    except Exception:
      if jax.process_count() == 1:
        if meter.pending:
          self.writer.scalars(step, meter.flush(step))
        self.save(step, state)
        self.checkpoints.wait()
        logging.info("saved step %d, whose evaluation failed", step)
      raise

  def check_best(self) -> None:
    """Refuses a `checkpoint.best` of an evaluation that is not among others."""
    best, evals = self.config.checkpoint.best, self.config.evals
    if best and evals and best.split("/")[0] not in evals:
      names = [f"{name}/…" for name in evals]
      raise unknown("evaluation in checkpoint.best", best, names)

  def save(self, step: int, state: Any) -> None:
    """Starts an asynchronous checkpoint."""
    metrics = self.scores or None
    best = self.config.checkpoint.best
    # Scores of an earlier step are not this one's.
    fresh = self.scored.get(best.split("/")[0]) == step
    if best and not (fresh and best in self.scores):
      metrics = None
    self.checkpoints.save(
      step,
      experiment.stored(self.config, state),
      metrics=metrics,
      extra={"scores": self.scores, **self.lost(step)},
    )

  def lost(self, step: int) -> dict[str, Any]:
    """Clips that no process could read, in training up to a step and later."""
    counts: collections.Counter[str] = collections.Counter()
    for part in parallel.exchange(self.skipped.dump(step - self.first)):
      counts.update(part)
    return {"skipped": dict(counts), "left_out": evaluate.merged(self.left_out)}

  def finish(self, state: Any) -> None:
    """Final scores, report, and the mark that the stage is done."""
    total = self.setup.total_steps
    if total not in self.checkpoints.steps():
      self.save(total, state)
    missing = [
      name
      for name in self.evaluators
      if not any(key.startswith(f"{name}/") for key in self.scores)
    ]
    self.evaluate(state, total, missing)
    self.checkpoints.wait()
    lost = self.lost(total)
    if jax.process_index() == 0:
      report.write(self.run, self.config, self.scores, **lost)
      record = {"step": total, "scores": self.scores}
      write_text(self.run.done, json.dumps(record, indent=2) + "\n")

  @contextlib.contextmanager
  def signals(self) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C save and exit; a second Ctrl-C exits."""

    def note(number: int, frame: Any) -> None:
      if self.interrupted:
        raise KeyboardInterrupt
      self.interrupted = True
      name = signal.Signals(number).name
      logging.info("%s: saving after this step, then exit", name)

    old = {}
    # Not outside the main thread (a notebook's worker).
    with contextlib.suppress(ValueError):
      for number in (signal.SIGTERM, signal.SIGINT):
        old[number] = signal.signal(number, note)
    try:
      yield
    finally:
      for number, handler in old.items():
        signal.signal(number, handler)

  def stopping(self, step: int) -> bool:
    """Whether to save and leave now; all processes agree on the step."""
    if jax.process_count() > 1 and step % self.config.log_every:
      return False
    return self.agreed()

  def agreed(self) -> bool:
    """Whether any process was interrupted; all have to ask."""
    self.interrupted = any(parallel.exchange(self.interrupted))
    return self.interrupted

  def leave(self, step: int) -> None:
    """Ends the process after an interruption, the state being saved."""
    self.checkpoints.wait()
    logging.info("saved step %d; the same command goes on from there", step)
    sys.exit(128 + signal.SIGTERM)

  def say_costs(self, products: int, step_fn: Any, seconds: float) -> None:
    """Compile time, FLOPs and memory of a step, before the first one."""
    setup = self.setup
    logging.info(
      "compiled the step in %.1f s: %.2f TFLOP of matrix products, %s; %d "
      "steps of batch %d on %s",
      seconds,
      products / 1e12,
      memory.of_program(step_fn),
      setup.total_steps,
      self.config.batch_size,
      dict(setup.mesh.shape),
    )


class Meter:
  """Collects device metrics without waiting for them, and the speed."""

  def __init__(self, setup: experiment.Experiment, first: int):
    self.setup = setup
    self.pending: list[tuple[int, Mapping[str, jax.Array]]] = []
    self.first = self.last = first
    self.began = time.perf_counter()
    self.paused = 0.0

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Notes the metrics of a step; nothing is fetched."""
    self.pending.append((step, metrics))

  def pause(self) -> None:
    """Leaves evaluation and saving out of the rate."""
    self.began, self.last = time.perf_counter(), self.pending_step()

  def pending_step(self) -> int:
    """The last step that was added or flushed."""
    return self.pending[-1][0] if self.pending else self.last

  def flush(self, step: int) -> dict[str, float]:
    """Means since the last flush, and the speed.

    Raises:
      FloatingPointError: a metric is not finite; names step and metric.
    """
    fetched = jax.device_get(self.pending)
    self.pending = []
    for at, metrics in fetched:
      for name, value in metrics.items():
        if not np.isfinite(value).all():
          raise FloatingPointError(
            f"{name} is {value} at step {at}; training stops. The last "
            "checkpoint is finite; lower schedule.base_lr or set "
            "optimizer.clip_norm."
          )
    means = {
      name: float(np.mean([metrics[name] for _, metrics in fetched]))
      for name in fetched[0][1]
    }
    seconds = max(time.perf_counter() - self.began, 1e-9)
    rate = (step - self.last) / seconds
    self.began, self.last = time.perf_counter(), step
    batch = self.setup.config.batch_size
    left = (self.setup.total_steps - step) / max(rate, 1e-9)
    logging.info(
      "step %d/%d %s | %.2f steps/s %.1f clips/s, %s left, %s",
      step,
      self.setup.total_steps,
      report.in_words(means),
      rate,
      rate * batch,
      report.duration(left),
      memory.now(),
    )
    means["learning_rate"] = float(fetched[-1][1]["learning_rate"])
    return {**means, "steps_per_s": rate, "clips_per_s": rate * batch}
