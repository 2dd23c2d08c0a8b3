"""What several models retrieve for the same queries, side by side.

python -m avjax.compare --workdirs=runs/a,runs/b --output=DIR
python -m avjax.compare --workdirs=runs/a,runs/b --names=CAV-MAE,DETECLAP
    --output=DIR --split=test --count=6 --top=3

Every run is evaluated as `avjax.evaluate` does with its config's retrieval
section; for captions see `avjax.compare_text`. Files in DIR:

| file | |
|---|---|
| `comparison_a2v.png`, `comparison_v2a.png` | queries, each model's first |
| `comparison_map.png` | t-SNE of sounds and pictures, by class |
| `comparison.csv` | every query's id, direction and rank by model |
| `comparison.md` | what the models find, see `table` |

The pictures show queries of two sorts, named in each row: those that the last
model ranks better than the first by the largest factor, and those drawn at
random, the same with every call, which show the usual case.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags, logging
from jaxtyping import Float

from avjax import (
  commands,
  compare_ranks,
  compare_text,
  embedding_map,
  evaluate,
  evaluators,
  experiment,
  initialise,
  objects,
  plots,
  ranking,
)
from avjax import config as config_lib
from avjax.errors import InputError, unknown
from avjax.evaluators import retrieval_pictures as pictures
from avjax.evaluators.base import Context
from avjax.evaluators.embeddings import class_numbers
from avjax.evaluators.retrieval import DIRECTIONS, Pairs, Retrieval


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A model's embeddings and ranks, sorted by the clips' ids.

  Attributes:
    name: of the model.
    data: name of the data set and of the split.
    pairs: embeddings.
    ids: of the clips.
    ranks: direction -> rank of each query's own item, from 1.
    clips: where the pictures come from.
    labels: classes of each clip, the main one first.
    classes: names of the classes; () = the data set has none.
  """

  name: str
  data: tuple[str, str]
  pairs: Pairs
  ids: Sequence[str]
  ranks: Mapping[str, Float[np.ndarray, "b"]]
  clips: pictures.Clips
  labels: embedding_map.Labels = ()
  classes: Sequence[str] = ()


# --- Every model by itself ---


def rank(
  path: Any,
  name: str,
  *,
  evaluation: str = "retrieval",
  split: str = "",
  settings: Sequence[str] = (),
) -> Ranked | compare_text.Ranked:
  """Embeds a run's split and ranks it.

  Args:
    path: a run's folder, a stage of it, or one checkpoint.
    name: of the model.
    evaluation: entry of the config's `evals` that says split, subset, limit
      and views.
    split: instead of that entry's; '' = that one.
    settings: `key=value`, see `avjax.evaluate.with_settings`.

  Raises:
    InputError: no such run, or none that can retrieve.
  """
  run, step = initialise.locate(path)
  config = objects.without_scores(config_lib.from_plain(run.read_config()))
  if evaluation not in config.evals:
    raise unknown(f"evaluation of {path}", evaluation, config.evals)
  section = config.evals[evaluation]
  if section.type not in RANKED:
    raise InputError(
      f"{path}: its evaluation {evaluation!r} is of type {section.type!r}, not "
      f"{' or '.join(map(repr, RANKED))}"
    )
  chosen = [f"evals.{evaluation}.split={split}"] if split else []
  evaluate.with_settings(config, [*chosen, *settings])
  setup = experiment.build(config)
  context = Context(
    config=config,
    method=setup.method,
    prepare=setup.prepare,
    batches=lambda section: evaluate.batches(setup, section),
    workdir=run,
    picture=lambda name, picture, step: None,
  )
  step, params = evaluate.restored(run, setup, step)
  evaluator = evaluators.make(context, section)
  try:
    found = RANKED[section.type](name, evaluator, params)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error
  logging.info("%s: step %d of %s", name, step, run.root)
  return found


def _ranked(name: str, evaluator: Retrieval, params: Any) -> Ranked:
  pairs = evaluator.embed(params)
  ids = evaluator.built.column("id")[pairs.number]
  order = np.argsort(ids, kind="stable")
  pairs = dataclasses.replace(
    pairs,
    audio=pairs.audio[order],
    video=pairs.video[order],
    number=pairs.number[order],
  )
  both = ranking.ranks(pairs.audio, pairs.video)
  labels = class_numbers(evaluator.built)
  return Ranked(
    name,
    (evaluator.context.config.data.name, evaluator.section.split),
    pairs,
    [str(i) for i in ids[order]],
    {"a2v": both.forward, "v2a": both.backward},
    evaluator.clips,
    [labels[number] for number in pairs.number],
    tuple(evaluator.built.metadata.get("classes", {}).get("label", ())),
  )


# Type of an evaluation -> (name of the model, evaluator, parameters) -> ranked.
RANKED = {"retrieval": _ranked, "text_retrieval": compare_text.ranked}

# --- Together ---


def check(models: Sequence[Ranked]) -> None:
  """Refuses models that were asked for different clips.

  Raises:
    InputError: says in what they differ.
  """
  first = models[0]
  for other in models[1:]:
    for what, a, b in zip(
      ("data set", "split"), first.data, other.data, strict=True
    ):
      if a != b:
        raise InputError(
          f"{first.name} and {other.name} differ in their {what}: {a!r} and "
          f"{b!r}"
        )
    if first.ids != other.ids:
      common = len(set(first.ids) & set(other.ids))
      raise InputError(
        f"{first.name} and {other.name} differ in their clips: "
        f"{len(first.ids)} and {len(other.ids)}, {common} of them in both; "
        "see data.dir, and subset and limit of the evaluation"
      )


def draw(
  models: Sequence[Ranked], way: str, *, count: int, top: int
) -> plots.Picture:
  """Rows of queries, each with the first of every model and its ranks."""
  shown = models[-1]
  top = min(top, len(shown.ids))
  names = [pictures.shortened(model.name) for model in models]
  rows = []
  chosen = compare_ranks.choose(models[0].ranks[way], shown.ranks[way], count)
  for sort, query in chosen:
    lines = [sort, "", "rank of its own", f"among {len(shown.ids)}:", ""]
    cells = [pictures.asking(way, shown.clips, int(shown.pairs.number[query]))]
    for name, model in zip(names, models, strict=True):
      lines.append(f"{name} {model.ranks[way][query]:.0f}")
      cells += pictures.answers(
        way, _similar(model.pairs, way, query), query, shown.pairs.number,
        shown.clips, top=top, own=False,
      )  # fmt: skip
    rows.append(("\n".join(lines), cells))
  words, asking = pictures.WORDS[way]
  others = [f"{k + 2}." for k in range(top - 1)]
  places = [text for name in names for text in (f"{name}, 1.", *others)]
  return pictures.cell_grid(
    rows,
    columns=[asking, *places],
    title=f"{', split '.join(shown.data)}: {words}; {pictures.LEGEND}",
    breaks=[1 + top * number for number in range(len(models))],
  )


def _similar(pairs: Pairs, way: str, query: int) -> Float[np.ndarray, "b"]:
  if way == "a2v":
    return pairs.video @ pairs.audio[query]
  return pairs.audio @ pairs.video[query]


def draw_map(models: Sequence[Ranked], classes: int) -> plots.Picture | None:
  """Sounds and pictures of the most frequent classes; None = too few points."""
  first = models[0]
  clips, labels = embedding_map.choose(first.labels, classes)
  if len(clips) < 2:
    return None
  panels = {
    pictures.shortened(m.name): (m.pairs.audio[clips], m.pairs.video[clips])
    for m in models
  }
  return embedding_map.draw(
    panels,
    labels,
    first.classes,
    title=f"t-SNE of {', split '.join(first.data)}",
  )


def same_class(model: Ranked, way: str) -> str:
  """Share of queries whose first answer has their class; '' = no classes."""
  sides = model.pairs.audio, model.pairs.video
  sides = sides if way == "a2v" else sides[::-1]
  share = embedding_map.same_class(*sides, model.labels)
  return "" if np.isnan(share) else f"{share:.3f}"


def ranks_of(models: Sequence[Ranked]) -> dict[str, Float[np.ndarray, "m b"]]:
  """Direction -> ranks by model."""
  return {way: np.stack([m.ranks[way] for m in models]) for way in DIRECTIONS}


def table(models: Sequence[Ranked]) -> str:
  """Markdown by direction and model.

  Recalls, how often the first that is found has the query's class, and in how
  many queries the model alone is ahead.
  """
  return compare_ranks.table(
    [model.name for model in models],
    ranks_of(models),
    "first of its class",
    {way: [same_class(m, way) for m in models] for way in DIRECTIONS},
  )


def write(
  models: Sequence[Ranked], output: Any, *, count: int, top: int, classes: int
) -> str:
  """Writes the files into a folder; returns `table`."""
  names, text = [model.name for model in models], table(models)
  ids = dict.fromkeys(DIRECTIONS, models[0].ids)
  folder = compare_ranks.write(output, names, ids, ranks_of(models), text)
  for way in DIRECTIONS:
    picture = draw(models, way, count=count, top=top)
    plots.save(folder / f"comparison_{way}.png", picture)
  picture = draw_map(models, classes)
  if picture is None:
    logging.warning("no map: fewer than two clips have a class")
  else:
    plots.save(folder / "comparison_map.png", picture)
  return text


def compare(
  paths: Sequence[str],
  output: Any,
  *,
  names: Sequence[str] = (),
  count: int = 6,
  top: int = 3,
  classes: int = 10,
  **options: Any,
) -> str:
  """Ranks, checks and writes.

  Args:
    paths: of the runs; the last is compared with the first.
    output: folder.
    names: of the models; () = the parts in which the paths differ.
    count: rows of each picture.
    top: how many of each model's first are shown.
    classes: how many of the most frequent the map has.
    **options: of `rank`.

  Returns:
    Markdown of `table`.

  Raises:
    InputError: fewer than two runs, other names than runs, or runs that
      cannot be compared.
  """
  if len(paths) < 2:
    raise InputError(
      f"--workdirs names {len(paths)} run; a comparison needs two or more"
    )
  names = names or _names(paths)
  if len(names) != len(paths):
    raise InputError(f"{len(names)} names for {len(paths)} workdirs")
  if len(set(names)) < len(names):
    raise InputError(f"names {', '.join(names)}: each must be another")
  for flag, value in (("count", count), ("top", top), ("classes", classes)):
    if value < 1:
      raise InputError(f"--{flag}={value} must be at least 1")
  models = [
    rank(path, name, **options) for path, name in zip(paths, names, strict=True)
  ]
  if len({type(model) for model in models}) > 1:
    kind = options.get("evaluation", "retrieval")
    raise InputError(
      f"the evaluation {kind!r} of {', '.join(paths)} is of different types"
    )
  if isinstance(models[0], compare_text.Ranked):
    return compare_text.write(models, output, count=count, top=top)
  check(models)
  return write(models, output, count=count, top=top, classes=classes)


def _names(paths: Sequence[str]) -> list[str]:
  """The paths without the parts that all of them begin or end with."""
  parts = [list(pathlib.Path(path).parts) for path in paths]
  for end in (0, -1):
    while min(map(len, parts)) > 1 and len({p[end] for p in parts}) == 1:
      for part in parts:
        part.pop(end)
  return ["/".join(part) for part in parts]


def main(argv: list[str]) -> None:
  """Prints the table and where the pictures are."""
  del argv
  values = flags.FLAGS
  text = compare(
    values.workdirs,
    values.output,
    names=values.names,
    count=values.count,
    top=values.top,
    classes=values.classes,
    evaluation=values.eval,
    split=values.split,
    settings=values["set"].value,
  )
  print(text)
  for path in sorted(pathlib.Path(values.output).glob("comparison_*.png")):
    print(path)


if __name__ == "__main__":
  flags.DEFINE_list("workdirs", None, "Two runs or more, comma separated.")
  flags.DEFINE_list("names", [], "Of the models; default from the paths.")
  flags.DEFINE_string("output", None, "Folder of the files.")
  flags.DEFINE_string("eval", "retrieval", "Entry of the configs' evals.")
  flags.DEFINE_string("split", "", "Instead of the one that the entry names.")
  flags.DEFINE_integer("count", 6, "Rows of each picture.")
  flags.DEFINE_integer("top", 3, "How many of each model's first are shown.")
  flags.DEFINE_integer("classes", 10, "How many the map has.")
  flags.DEFINE_multi_string(
    "set", [], "KEY=VALUE, as avjax.evaluate has it, for all runs."
  )
  commands.run(main, required=("workdirs", "output"))
