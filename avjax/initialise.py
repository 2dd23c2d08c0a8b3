"""`config.init_from`: starts a model from another one's parameters.

They are those of a run or of a file of weights, public or our own.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from avjax import averaging, experiment, parallel
from avjax.checkpoint import restore_params
from avjax.errors import InputError
from avjax.methods.base import Loaded, Method
from avjax.weights import families, image, transfer
from avjax.workdir import Workdir, workdir, write_text

STAGES = "stages.json"  # in a staged run's folder: the names in order
# What two sources may be for: a modality each; or CoAVT's encoders, the
# audio-visual one and that of text and queries.
PARTS = (("audio", "video"), ("av", "text"))


@dataclasses.dataclass(frozen=True)
class Source:
  """Parameters under the house's names and the config they came from.

  An image model's (MAE, ViT), or AST's, are an image tree
  (`avjax.weights.image`) and its config is `image.CONFIG`: it can start a model
  but is none. `family` is that of a file, see
  `avjax.weights.families.FAMILIES`.
  """

  params: Any
  config: dict[str, Any]
  step: int
  path: pathlib.Path
  family: str = families.HOUSE


def parse(text: str) -> dict[str, str]:
  """'DIR' -> {'': 'DIR'}; 'audio:A,video:B' -> {'audio': 'A', 'video': 'B'}.

  Raises:
    InputError: the parts that are named are no pair of PARTS.
  """
  names = sum(PARTS, ())
  parts = dict(
    part.split(":", 1)
    for part in text.split(",")
    if part.split(":")[0] in names and ":" in part
  )
  if not parts:
    return {"": text}
  if set(parts) not in map(set, PARTS):
    pairs = " or ".join(",".join(f"{m}:PATH" for m in p) for p in PARTS)
    raise InputError(
      f"init_from={text!r} names {', '.join(parts)} alone; give {pairs}, or "
      "one PATH for both"
    )
  return parts


def read(path: str | pathlib.Path, *, complete: bool = True) -> Source:
  """Parameters of a file of weights, or the newest verified ones of a run.

  Args:
    path: a workdir (of a staged one the last stage that has checkpoints is
      taken, in the stages' order), a stage's folder, a
      `checkpoints` folder or one step in it; or a file of
      `avjax.weights.formats.read`, whose config is the one that goes with it.
    complete: False does not look for a public file's config: `config` is its
      method alone.

  Raises:
    InputError: there is no run, no intact checkpoint, no such weights, or no
      config that goes with them.
  """
  file = pathlib.Path(path).expanduser()
  if file.is_file():
    return from_file(families.load(file), file, complete=complete)
  run, step = locate(path)
  config = run.read_config()
  step, params = restore_params(run.checkpoints, step)
  return Source(params, config, step, run.root)


def from_file(
  weights: families.Weights, file: pathlib.Path, *, complete: bool = True
) -> Source:
  """`read` for weights that have been loaded."""
  config = weights.config or {"method": weights.method, "model": {}}
  if weights.method == image.METHOD:
    config = image.CONFIG
  elif complete:
    config = families.config_of(weights)
  return Source(weights.params, config, 0, file, weights.family)


def locate(path: str | pathlib.Path) -> tuple[Workdir, int | None]:
  """The run's folder that a path lies in, and the step if it names one."""
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise InputError(f"{path} does not exist")
  if path.is_file():
    raise InputError(
      f"{path} is a file, not a run; `python -m avjax.convert --weights={path} "
      "--output=DIR` makes a folder that can be evaluated"
    )
  step = None
  if path.name.isdigit() and path.parent.name == "checkpoints":
    step, path = int(path.name), path.parent
  if path.name == "checkpoints":
    path = path.parent
  run = workdir(path)
  if run.config.exists():
    return run, step
  inner = [p.parent for p in path.glob("*/config.json")]
  inner = [p for p in inner if any(workdir(p).checkpoints.glob("[0-9]*"))]
  if not inner:
    raise InputError(
      f"{path} is neither a run nor a checkpoint: there is no {run.config} "
      "and no stage with checkpoints below it"
    )
  order = read_stages(run)

  def rank(stage: pathlib.Path) -> tuple[int, float]:
    # Folders of earlier versions do not tell the order: the newest then.
    place = order.index(stage.name) if stage.name in order else -1
    return place, workdir(stage).config.stat().st_mtime

  return workdir(max(inner, key=rank)), None


def read_stages(run: Workdir) -> list[str]:
  """The stages of a staged run in their order; [] where none is noted."""
  path = run.root / STAGES
  return json.loads(path.read_text()) if path.exists() else []


def note_stages(run: Workdir, names: Sequence[str]) -> None:
  """Notes the order of stages, behind those that were trained before."""
  before = read_stages(run)
  after = [name for name in names if name not in before]
  order = list(names) if set(before) <= set(names) else before + after
  if order != before:
    run.root.mkdir(parents=True, exist_ok=True)
    write_text(run.root / STAGES, json.dumps(order) + "\n")


def from_weights(
  setup: experiment.Experiment, state: experiment.State, run: Workdir
) -> experiment.State:
  """The first state with `init_from`'s parameters in place.

  A report of loaded, missing, unused and reshaped parameters is printed and
  saved as loading.json.
  """
  config = setup.config
  named = parse(config.init_from).items()
  parts = {m: read(path, complete=False) for m, path in named}
  target = parallel.to_host(experiment.stored(config, state["params"]))
  loaded = adapt(setup.method, target, parts)
  if not loaded.loaded:
    raise InputError(
      f"nothing in {config.init_from} fits the method {config.method}: "
      f"{len(loaded.unused)} parameters there, {len(loaded.missing)} here"
    )
  if jax.process_index() == 0:
    say(loaded, parts, run)
  shardings = jax.tree.map(lambda x: x.sharding, setup.state_shapes["params"])
  params = jax.device_put(experiment.live(config, loaded.params), shardings)
  state["params"] = params
  state["average"] = averaging.init(config.optimizer, params)
  return state


def adapt(method: Method, params: Any, parts: dict[str, Source]) -> Loaded:
  """A method's parameters with the sources' in place.

  Args:
    method: of the model to start.
    params: its initial parameters, or their shapes.
    parts: by modality as `parse` has it.

  Raises:
    InputError: an image model beside a source of another kind; or the
      parameters do not fit.
  """
  config = {m: part.config for m, part in parts.items()}
  source = {m: _turned(part, method.config) for m, part in parts.items()}
  if "" in parts:
    config, source = config[""], source[""]
  images = [m for m, p in parts.items() if p.config["method"] == image.METHOD]
  if images and len(images) < len(parts):
    (own,) = set(parts) - set(images)
    raise InputError(
      f"init_from: {parts[images[0]].path} is an image model, "
      f"{parts[own].path} is not; convert the first to an audiovisual model "
      "with python -m avjax.convert --config=…"
    )
  if images:
    return image.start(params, source, method.config)
  if type(method).adapt is Method.adapt:
    # No rules of its own: equal names, equal shapes.
    return transfer.fill(params, source, lambda path: [path])
  return method.adapt(params, source, config)


def _turned(part: Source, config: Any) -> Any:
  """The source's parameters with its spectrogram as the model has it.

  Patches and audio tokens of `image.MEL_FIRST` are ordered mel first, those of
  AV-MAE and MBT time first.
  """
  mel_first = image.MEL_FIRST
  first = [c["method"].startswith(mel_first) for c in (part.config, config)]
  embed = part.params.get("embed_audio")
  if part.config["method"] == image.METHOD or first[0] == first[1] or not embed:
    return part.params
  kernel, patch = np.asarray(embed["kernel"]), tuple(config.model.patch_audio)
  mel = patch[0 if first[1] else 1]
  bands, turned = config.data.fbank.num_mels // mel, dict(part.params)

  def swap(x, rows):
    """[rows*columns ... d] -> [columns*rows ... d]."""
    x = x.reshape(rows, -1, *x.shape[1:])
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

  width = kernel.shape[-1]
  if len(kernel) % math.prod(patch) == 0:  # else its shape will be refused
    pixels = swap(kernel.reshape(math.prod(patch), -1, width), patch[1])
    turned["embed_audio"] = {**embed, "kernel": pixels.reshape(-1, width)}
  table = part.params.get("positions_audio")
  if table is not None and len(table) % bands == 0:
    rows = bands if first[0] else len(table) // bands
    turned["positions_audio"] = swap(np.asarray(table), rows)
  return turned


def say(loaded: Loaded, parts: dict[str, Source], run: Workdir) -> None:
  """Prints the counts and every name that was not simply loaded."""
  for modality, part in parts.items():
    logging.info(
      "init_from%s: %s at step %d",
      f" ({modality})" if modality else "",
      part.path,
      part.step,
    )
  logging.info(
    "loaded %d, missing %d, unused %d, reshaped %d parameters",
    len(loaded.loaded),
    len(loaded.missing),
    len(loaded.unused),
    len(loaded.reshaped),
  )
  for name in loaded.missing:
    logging.info("  missing (initial value kept): %s", name)
  for name in loaded.unused:
    logging.info("  unused: %s", name)
  for name, how in loaded.reshaped.items():
    logging.info("  reshaped: %s (%s)", name, how)
  record = {
    "loaded": dict(loaded.loaded),
    "missing": list(loaded.missing),
    "unused": list(loaded.unused),
    "reshaped": dict(loaded.reshaped),
  }
  run.loading_report.write_text(json.dumps(record, indent=2) + "\n")
