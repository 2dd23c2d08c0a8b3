"""Weights in and out: public checkpoints, and folders and files of ours.

python -m avjax.convert --weights=IN --output=OUT [--config=configs/x.py:arg]
python -m avjax.convert --list

IN is a file of any family in `--list` (PyTorch, safetensors, npz, Flax
msgpack), or a run of ours. OUT is a folder that `init_from`, `avjax.load` and
`avjax.evaluate` take for a run, or a file: `.safetensors` or `.npz` under the
house's names, or with `--layout=public` under those of the public code
(`.safetensors`, `.npz`, `.pth`). There and back again is exact, bit for bit:
arrays that are no parameters here travel along (`aside.safetensors`, or names
that begin with `aside/`).

`--config` says which model it becomes, where that is not the one the file is
of: an image model (MAE, ViT, AST) always needs it. Without it the published
config of that checkpoint is taken. A position table of another clip length or
picture size is resized: CAV-MAE's audio grid is frequency-major, so its time
axis is cut or interpolated, never its rows
(`avjax.weights.transfer.time_axis`).
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from avjax import commands, experiment, initialise, methods, trees
from avjax import config as config_lib
from avjax.checkpoint import Checkpoints
from avjax.data import pipeline
from avjax.errors import InputError, lookup
from avjax.methods.avmae_config import DECODER_SIZES
from avjax.methods.base import Loaded
from avjax.nn import sizes
from avjax.weights import (
  avsiam,
  bert,
  cavmae,
  class_lists,
  convnext,
  families,
  formats,
  image,
  scenic,
  table,
  uavm,
)
from avjax.workdir import Workdir, workdir

LAYOUTS = ("house", "public")
# What a converted folder holds beside a run's files.
ORIGIN, ASIDE = "weights.json", "aside.safetensors"


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every name.

  Attributes:
    family: of the file; see `families.FAMILIES`.
    loaded: name of a parameter -> name in the file's house form.
    missing: parameters that keep their initial values.
    unused: names of the house form that no parameter took.
    reshaped: parameter -> words on how it was changed.
    misshaped: parameter -> shape there and shape wanted, where these differ
      and no rule changes the one into the other: initial value kept.
    aside: public names of what is kept beside the parameters.
  """

  family: str
  loaded: Mapping[str, str]
  missing: Sequence[str]
  unused: Sequence[str]
  reshaped: Mapping[str, str]
  misshaped: Mapping[str, str]
  aside: Sequence[str]

  def lines(self) -> list[str]:
    """The counts, and every name that was not simply loaded."""
    counts = ", ".join(
      f"{field.name} {len(getattr(self, field.name))}"
      for field in dataclasses.fields(self)[1:]
    )
    rows = [f"family {self.family}: {counts}"]
    rows += [f"  missing (initial value): {name}" for name in self.missing]
    rows += [f"  unused: {name}" for name in self.unused]
    for word, named in (
      ("reshaped", self.reshaped),
      ("mis-shaped", self.misshaped),
    ):
      rows += [f"  {word}: {name} ({how})" for name, how in named.items()]
    return rows


def convert(
  weights: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  config: Any = None,
  family: str = "",
  layout: str = "house",
) -> Report:
  """Reads weights and writes them; see the module.

  Args:
    weights: file or folder to read.
    output: file or folder to write; a folder must be new or empty.
    config: of the model that the weights become, maybe staged; None = theirs.
    family: name in `families.FAMILIES`; '' = told by the names.
    layout: one of LAYOUTS, for files.

  Raises:
    InputError: the file is damaged, of no known family or does not fit the
      model; nothing has been written then.
  """
  lookup(dict.fromkeys(LAYOUTS), layout, "layout")
  out = pathlib.Path(output).expanduser()
  to_file = out.suffix in formats.WRITERS
  check_output(out, to_file, layout)
  source = read(weights, family)
  if to_file and config is None:
    report = unchanged(source)
    plain = source.config or _config_or_none(source)
  else:
    config = families.config_of(source) if config is None else config
    source, report, plain = become(source, config)
  if not to_file:
    write_folder(out, source, plain, pathlib.Path(weights), report)
  elif layout == "public":
    formats.write(out, public_arrays(source, plain), {"format": "pt"})
  else:
    arrays, words = families.house_arrays(
      source.params, source.aside, plain, source.family
    )
    formats.write(out, arrays, words)
  return report


def check_output(out: pathlib.Path, to_file: bool, layout: str) -> None:
  """Refuses, before any work, what could not be written.

  Raises:
    InputError: an unknown suffix, a folder that holds something, or a layout
      that the kind of output does not have.
  """
  # A suffix such as .bin means a file; that of lr_0.5 is none.
  if not to_file and out.suffix[1:2].isalpha() and not out.is_dir():
    lookup(formats.WRITERS, out.suffix, "suffix of a weights file to write")
  if not to_file and layout == "public":
    raise InputError(f"--layout=public is for files; {out} is a folder")
  if not to_file and out.exists() and (out.is_file() or any(out.iterdir())):
    raise InputError(f"{out} exists and is not an empty folder")
  if to_file and out.suffix == ".pth":
    formats.torch_library()
    if layout == "house":
      raise InputError(f"{out}: .pth goes with --layout=public alone")


def read(path: str | os.PathLike[str], family: str = "") -> families.Weights:
  """A public file, a file of ours or a run, with what is kept aside.

  Raises:
    InputError: it cannot be read, or is of no known family.
  """
  place = pathlib.Path(path).expanduser()
  if not place.is_dir():
    return families.load(place, family)
  found = initialise.read(place)
  method = found.config["method"]
  aside, kept = {}, found.path / ASIDE
  if kept.exists():
    aside = formats.read(kept)
  origin = found.path / ORIGIN
  name = family or families.HOUSE
  if origin.exists():
    name = json.loads(origin.read_text())["family"]
  names = tuple(trees.flatten(found.params))
  return families.Weights(
    name, method, found.params, aside, found.config, names
  )


def unchanged(source: families.Weights) -> Report:
  """The report of a conversion that changes names alone."""
  names = list(trees.flatten(source.params))
  unused = [name for name in names if name.startswith("unused/")]
  loaded = {name: name for name in names if name not in unused}
  return Report(source.family, loaded, [], unused, {}, {}, sorted(source.aside))


def _config_or_none(source: families.Weights) -> dict[str, Any] | None:
  """A file may be rewritten though no config goes with it."""
  try:
    return families.config_of(source)
  except InputError as error:
    logging.info("no config goes along: %s", error)
    return None


# --- Into a model ------------------------------------------------------------


def become(
  source: families.Weights, config: Any
) -> tuple[families.Weights, Report, dict[str, Any]]:
  """The model of a config with these weights, initial values elsewhere.

  Returns:
    Its parameters as weights, the report, and the plain config.

  Raises:
    InputError: nothing fits, or shapes differ; names all that do.
  """
  if isinstance(config, Mapping):
    config = config_lib.from_plain(config)
  wanted = "" if source.method in families.STARTERS else source.method
  stage = families.stage(config, wanted if config.stages else "")
  plain = config_lib.plain(stage)
  config = config_lib.from_plain(plain)
  method = methods.make(config)
  shapes = jax.eval_shape(functools.partial(_initial, config, method))
  part = initialise.from_file(source, pathlib.Path(), complete=False)
  differing = _differing(shapes, source)
  try:
    loaded = initialise.adapt(method, shapes, {"": part})
  except InputError as error:
    rows = [f"{name} {how}" for name, how in differing.items()]
    more = f"; mis-shaped: {', '.join(rows)}" if rows else ""
    raise InputError(f"{error}{more}") from error
  if not loaded.loaded:
    raise InputError(
      f"nothing in the weights fits the method {config.method}: "
      f"{len(loaded.unused)} parameters there, {len(loaded.missing)} here"
    )
  params = _filled(loaded, functools.partial(_initial, config, method))
  same = config.method == source.method
  aside = source.aside if same else {}
  misshaped = {n: how for n, how in differing.items() if n in loaded.missing}
  report = Report(
    source.family,
    loaded.loaded,
    [name for name in loaded.missing if name not in misshaped],
    loaded.unused,
    loaded.reshaped,
    misshaped,
    sorted(aside),
  )
  family = source.family if same else families.HOUSE
  names = tuple(trees.flatten(params))
  made = families.Weights(family, config.method, params, aside, plain, names)
  return made, report, plain


def _initial(config: Any, method: Any) -> Any:
  """Initial parameters; a batch of one, all zero, says the sizes."""
  shapes = pipeline.batch_shapes(config.data, 1, train=False)
  batch = {key: np.zeros(*how) for key, how in shapes.items()}
  rng = jax.random.key(config.seed)
  params = experiment.init_params(config, method, rng, batch)
  return experiment.stored(config, params)


def _differing(shapes: Any, source: families.Weights) -> dict[str, str]:
  """Parameters that the source has under the same name in another shape."""
  if source.method == image.METHOD:
    return {}
  origin = trees.flatten(source.params)
  return {
    name: f"{tuple(np.shape(origin[name]))} there, {x.shape} here"
    for name, x in trees.flatten(shapes).items()
    if name in origin and np.shape(origin[name]) != x.shape
  }


def _filled(loaded: Loaded, initial: Any) -> Any:
  """The parameters, initial values where the source had none."""
  params = trees.flatten(loaded.params)
  if loaded.missing:

    def missing():  # and no more, so that the rest is not computed
      values = trees.flatten(initial())
      return {name: values[name] for name in loaded.missing}

    params |= jax.device_get(jax.jit(missing)())
  return trees.unflatten(params)


# --- Out ---------------------------------------------------------------------


def write_folder(
  out: pathlib.Path,
  made: families.Weights,
  plain: Mapping[str, Any],
  origin: pathlib.Path,
  report: Report,
) -> None:
  """A folder like a run's, at step 0; complete before it has its name."""
  unfinished = workdir(out.with_name(f"{out.name}.{os.getpid()}.tmp"))
  unfinished.root.mkdir(parents=True)
  try:
    with Checkpoints(unfinished.checkpoints, keep=1) as checkpoints:
      checkpoints.save(0, {"params": made.params}, wait=True)
    _write_json(unfinished.config, plain)
    words = {"file": origin.name, "family": made.family}
    _write_json(unfinished.root / ORIGIN, words)
    _write_json(unfinished.loading_report, dataclasses.asdict(report))
    _write_classes(unfinished, plain, made.family)
    if made.aside:
      formats.write(unfinished.root / ASIDE, made.aside)
    os.replace(unfinished.root, out)
  finally:
    shutil.rmtree(unfinished.root, ignore_errors=True)


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def _write_classes(run: Workdir, plain: Mapping[str, Any], family: str) -> None:
  """Class names in the order of the logits, where these are known."""
  if "classes" not in plain["model"]:
    return
  if class_lists.orderless(family):
    logging.warning("the released MBT weights do not say their classes' order")
    return
  config = config_lib.from_plain(plain)
  data = config.data
  try:
    names = {h: list(pipeline.class_names(data, h)) for h in data.heads}
  except InputError as error:
    logging.info("%s", error)
    names = class_lists.class_names(family, config)
  if names:
    _write_json(run.classes, names)


def public_arrays(
  source: families.Weights, plain: Mapping[str, Any] | None
) -> dict[str, np.ndarray]:
  """The arrays under the names of the public code.

  Raises:
    InputError: an image model, or a method without public code.
  """
  if source.method in ("cavmae", "cavmae_finetune"):
    params = class_lists.class_order(source.params, to_house=False)
    return cavmae.to_reference(params, source.aside)
  if source.method in ("avsiam", "avsiam_finetune"):
    return avsiam.to_reference(source.params, source.aside)
  if source.method == bert.METHOD:
    return bert.to_reference(source.params, source.aside)
  if source.method in ("uavm", "convnext"):
    params = class_lists.class_order(source.params, to_house=False)
    module = {"uavm": uavm, "convnext": convnext}[source.method]
    return module.to_reference(params, source.aside)
  if source.method not in ("avmae", "mbt"):
    raise InputError(
      f"--layout=public has no names for weights of method {source.method!r}"
    )
  if plain is None:
    raise InputError("the number of heads is in the config: give --config")
  model = plain["model"]
  learned = source.method == "mbt" and model["positions"] == "learned_1d"
  names = "mbt_original" if learned else source.method
  decoder = {}
  if source.method == "avmae":
    size = sizes.resolve(model, "decoder_", DECODER_SIZES)
    decoder = {"decoder_heads": size.heads}
  return scenic.to_reference(
    source.params,
    names,
    heads=sizes.resolve(model).heads,
    patch=model["patch_video"][-1],
    **decoder,
  )


def main(argv: list[str]) -> None:
  """Prints the report, or the list."""
  del argv
  values = flags.FLAGS
  if values.list:
    print(table.markdown())
    return
  for flag in ("weights", "output"):
    if not values[flag].value:
      raise InputError(f"--{flag} is missing; --list shows what can be read")
  report = convert(
    values.weights,
    values.output,
    config=values.config,
    family=values.family,
    layout=values.layout,
  )
  print("\n".join(report.lines()))
  print(f"written to {values.output}")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "Of the model that the weights become.", lock_config=True
  )
  flags.DEFINE_string("weights", "", "A weights file or a run to read.")
  flags.DEFINE_string("output", "", "A file or a new folder to write.")
  flags.DEFINE_string("family", "", "Instead of what the names tell.")
  flags.DEFINE_string("layout", "house", "Names in files: house or public.")
  flags.DEFINE_bool("list", False, "Print the public checkpoints and end.")
  commands.run(main)
