"""Configs that can be measured where none of their files is there."""

import contextlib
import importlib
import pathlib
import tempfile
from typing import Any

from avjax.errors import InputError, unknown

# The learning rate depends on it, speed does not.
STEPS_PER_EPOCH = 1_000


def load(file: str, *words: str, dtype: str = "", demo: bool = False) -> Any:
  """A config of the checkout, of a staged one the first stage.

  Args:
    file: configs/<file>.py.
    *words: of its argument; empty ones do not count.
    dtype: of the computation; "" = the config's.
    demo: a small model on small clips.

  Raises:
    InputError: there are no `configs` here.
  """
  try:
    module = importlib.import_module(f"configs.{file}")
  except ModuleNotFoundError as error:
    raise InputError(
      f"configs/{file}.py is not importable here: run from the checkout"
    ) from error
  config = stage_of(module.get_config(argument(*words, demo=demo)))
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.dtype = dtype or config.dtype
  return config


def argument(*words: str, demo: bool = False) -> str:
  """A config's argument of these words."""
  return ",".join(word for word in ("demo" * demo, *words) if word)


def stage_of(config: Any, stage: str = "") -> Any:
  """A stage of a staged config, by default the first; else the config.

  Raises:
    InputError: the config has no such stage.
  """
  if stage and stage not in config.stages:
    raise unknown("stage of the config", stage, config.stages)
  if not config.stages:
    return config
  return config[stage or config.stages[0]]


def with_groups(config: Any, batch_size: int) -> Any:
  """The config, ready for this batch (0: its own).

  Where `model.group_size` does not divide it, the group is the whole batch;
  a printed line says so.
  """
  group = config.model.get("group_size", 0)
  if not (batch_size and group and batch_size % group):
    return config
  print(
    f"model.group_size={group} does not divide --batch_size={batch_size}: "
    "measured with 0, the whole batch"
  )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.model.group_size = 0
  return config


def with_scores(config: Any, stack: contextlib.ExitStack) -> Any:
  """The config; noise for its objects' scores, if it has them.

  Args:
    config: one stage.
    stack: removes the file.
  """
  if not config.data.object_scores:
    return config
  from data_prep import synthetic

  folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="avjax-"))
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.object_scores = str(synthetic.scores(pathlib.Path(folder)))
  return config


def with_data(config: Any, batch_size: int, stack: contextlib.ExitStack) -> Any:
  """The config, its data set replaced by synthetic clips if it is absent."""
  from absl import logging

  from avjax.data import datasets

  try:
    datasets.built_dir(config.data)
    return config
  except InputError:
    logging.warning(
      "%s is not built: clips of noise of its size instead", config.data.name
    )
    return with_noise(config, batch_size, stack)


def with_noise(
  config: Any, batch_size: int, stack: contextlib.ExitStack
) -> Any:
  """The config on synthetic clips, at least a batch of them."""
  from data_prep import synthetic

  folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="avjax-"))
  clips = max(synthetic.CLIPS[config.data.variant], batch_size)
  built = synthetic.build(config.data, pathlib.Path(folder), clips)
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.dir = str(built)
    if config.data.object_scores:
      config.data.object_scores = str(synthetic.scores(built, clips))
    if config.data.features:
      made = synthetic.features(built, config.data, clips)
      config.data.features = str(made)
    if config.data.text.vocabulary:
      made = synthetic.vocabulary(built, config.model.get("vocabulary", 0))
      config.data.text.vocabulary = str(made)
    config.data.exclude = ""
  return config


def experiment_of(
  config: Any, batch_size: int, steps_per_epoch: int = STEPS_PER_EPOCH
) -> Any:
  """The experiment with this batch (0: its own), no data set being there."""
  from avjax import experiment

  return experiment.build(
    with_groups(config, batch_size),
    batch_size=batch_size,
    steps_per_epoch=steps_per_epoch,
  )
