"""Makes the evaluators of a run; re-evaluates a finished or running one.

python -m avjax.evaluate --workdir=DIR
python -m avjax.evaluate --workdir=DIR --set=evals.retrieval.subset=FILE.csv
"""

import ast
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags, logging

from avjax import (
  commands,
  evaluators,
  experiment,
  initialise,
  objects,
  parallel,
  report,
)
from avjax import config as config_lib
from avjax.checkpoint import restore_params
from avjax.data import pipeline, records
from avjax.errors import InputError, unknown
from avjax.evaluators import retrieval
from avjax.evaluators.base import Context, Evaluator
from avjax.experiment import Experiment
from avjax.workdir import Workdir, write_text
from avjax.writer import Writer

# Ids by split of clips that could not be read, and so have no part in scores.
LeftOut = dict[str, list[str]]


def make_evaluators(
  setup: Experiment, run: Workdir, writer: Writer, left_out: LeftOut
) -> dict[str, Evaluator]:
  """The evaluators of `config.evals` by name; they add to `left_out`."""
  context = Context(
    config=setup.config,
    method=setup.method,
    prepare=setup.prepare,
    batches=lambda section: batches(setup, section, left_out),
    workdir=run,
    picture=writer.picture,
  )
  return {
    name: evaluators.make(context, section)
    for name, section in sorted(setup.config.evals.items())
  }


def check(setup: Experiment) -> None:
  """Opens all that the evaluations will read, before anything is trained.

  Raises:
    InputError: names the evaluation, and what it lacks.
  """
  for name, section in sorted(setup.config.evals.items()):
    try:
      host_batches(setup, section, pipeline.Skipped()).close()
      if subset := section.get("subset", ""):
        data, split, limit = setup.config.data, section.split, section.limit
        retrieval.chosen_ids(subset, records.Split(data, split, limit))
    except InputError as error:
      raise InputError(f"evals.{name}: {error}") from error


def host_batches(
  setup: Experiment, section: Any, skipped: pipeline.Skipped
) -> Iterator[dict[str, Any]]:
  """This process's batches of one evaluation's split, in order."""
  size = section.batch_size or setup.config.batch_size
  parallel.check_batch(size, setup.mesh, "evaluation batch size")
  return pipeline.eval_batches(
    setup.config.data,
    split=section.split,
    batch_size=size,
    views=section.views,
    limit=section.limit,
    captions=section.get("captions", 0),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    skipped=skipped,
  )


def batches(
  setup: Experiment, section: Any, left_out: LeftOut | None = None
) -> Iterator[tuple[dict[str, jax.Array], list[str]]]:
  """Global device batches of one evaluation's split, in order.

  Clips that cannot be read are not valid there; `left_out` notes them.
  """
  skipped = pipeline.Skipped()
  host = host_batches(setup, section, skipped)
  sharding = parallel.batch_sharding(setup.mesh)
  stream = pipeline.device_batches(host, sharding, setup.config.data.prefetch)
  try:
    yield from stream
  finally:
    stream.close()
    lost = skipped.dump()
    if lost and left_out is not None:
      known = left_out.get(section.split, [])
      left_out[section.split] = sorted({*known, *lost})


def merged(left_out: LeftOut) -> LeftOut:
  """Those of all processes, each of which calls it."""
  found: dict[str, set[str]] = {}
  for part in parallel.exchange(left_out):
    for split, names in part.items():
      found.setdefault(split, set()).update(names)
  return {split: sorted(names) for split, names in found.items()}


def restored(
  run: Workdir, setup: Experiment, step: int | None
) -> tuple[int, Any]:
  """A checkpoint's step and parameters, as and where evaluations want them.

  Parameters alone: converted weights have no more than these.

  Args:
    run: the run's folder.
    setup: of its config.
    step: which checkpoint; None = the newest verified one.
  """
  step, params = restore_params(run.checkpoints, step)
  shardings = jax.tree.map(lambda x: x.sharding, setup.state_shapes["params"])
  return step, jax.device_put(experiment.live(setup.config, params), shardings)


def with_settings(config: Any, settings: Sequence[str]) -> dict[str, Any]:
  """Changes how a run is evaluated, in place.

  Args:
    config: of a run.
    settings: `key=value`; keys under `evals.` and `data.files.`, and
      `data.dir`. Names in a tuple are separated by commas.

  Returns:
    Key -> value of what was set.

  Raises:
    InputError: another key (the nearest is named), one given twice, or a
      value that is not of the key's type.
  """
  known = {"data.dir": config.data.dir}
  known |= {f"data.files.{k}": v for k, v in config.data.files.items()}
  for name, section in config.evals.items():
    # Also what came later than the run.
    filled = {**config_lib.eval_section(section.type), **section}
    known |= {f"evals.{name}.{k}": v for k, v in filled.items() if k != "type"}
  found: dict[str, Any] = {}
  for setting in settings:
    key, _, text = setting.partition("=")
    if key not in known:
      raise unknown("key of --set", key, known)
    if key in found:
      raise InputError(f"--set={key} is given twice")
    found[key] = _value(key, text, known[key])
  with config.unlocked():
    for key, value in found.items():
      *path, last = key.split(".")
      section = config
      for part in path:
        section = section[part]
      section[last] = value
  return found


def _value(key: str, text: str, old: Any) -> Any:
  """The text as a value of the old one's type."""
  kind = type(old)
  try:
    if kind is str:
      return text
    if kind is bool:
      return {"true": True, "false": False}[text.lower()]
    if kind is not tuple:
      return kind(text)
    if text.startswith("("):
      return tuple(ast.literal_eval(text))
    return tuple(filter(None, text.split(",")))
  except (KeyError, ValueError, SyntaxError) as error:
    raise InputError(
      f"--set={key}={text}: {text!r} is not {kind.__name__}, as {old!r} is"
    ) from error


def evaluate(
  path: Any,
  *,
  step: int | None = None,
  only: str = "",
  settings: Sequence[str] = (),
) -> dict[str, float]:
  """Runs the evaluations of a run's config on one of its checkpoints.

  Args:
    path: a run's folder, a stage of it (the newest stage otherwise), or one
      checkpoint.
    step: which checkpoint; None = the newest verified one.
    only: name of one evaluation; '' = all.
    settings: `key=value` instead of the config's, see `with_settings`.

  Returns:
    `<eval>/<metric>` -> score; also written to evaluation.json, with the
    settings and the clips that could not be read.

  Raises:
    InputError: no such run, step or evaluation; a bad setting.
  """
  run, named = initialise.locate(path)
  config = objects.without_scores(config_lib.from_plain(run.read_config()))
  if only and only not in config.evals:
    raise unknown("evaluation", only, config.evals)
  changed = with_settings(config, settings)
  setup = experiment.build(config)
  step, params = restored(run, setup, named if step is None else step)
  writer = Writer(Workdir(run.root / "evaluation"), step)
  scores, left_out = {}, {}
  made = make_evaluators(setup, run, writer, left_out)
  for name, evaluator in made.items():
    if only in ("", name):
      values = evaluator.run(params, step)
      scores |= {f"{name}/{key}": float(v) for key, v in values.items()}
  writer.close()
  left_out = merged(left_out)
  if jax.process_index() == 0:
    record = {"step": step, "set": changed, "scores": scores}
    record["left_out"] = left_out
    write_text(run.root / "evaluation.json", json.dumps(record, indent=2))
  logging.info("step %d of %s: %s", step, run.root, report.in_words(scores))
  return scores


def main(argv: list[str]) -> None:
  """Prints one line per score."""
  del argv
  logging.set_verbosity(logging.INFO)
  values = flags.FLAGS
  scores = evaluate(
    values.workdir,
    step=values.step,
    only=values.only,
    settings=values["set"].value,
  )
  for name, value in scores.items():
    print(f"{name} {value:.4f}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "A run, a stage of it or a checkpoint.")
  flags.DEFINE_integer("step", None, "Which checkpoint; default the newest.")
  flags.DEFINE_string("only", "", "One evaluation of the config; default all.")
  flags.DEFINE_multi_string(
    "set", [], "KEY=VALUE of evals., data.dir or data.files., for this time."
  )
  commands.run(main, required=("workdir",))
