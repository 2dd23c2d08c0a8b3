"""What the command-line programs share: errors in one line, demo data."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from avjax.errors import InputError

# Before JAX starts: a few per cent on CPUs with AVX-512, nothing elsewhere.
CPU_FLAG = "--xla_cpu_prefer_vector_width=512"


def run(
  main: Callable[[list[str]], Any],
  required: Sequence[str] = (),
  words: str = "",
) -> None:
  """`app.run`, but an InputError is one line and exit status 2.

  Args:
    main: given the program's name and the words that are no flags.
    required: flags that have to be given.
    words: the flag with which there may be such words.
  """
  present = os.environ.get("XLA_FLAGS", "")
  if CPU_FLAG.split("=")[0] not in present:
    os.environ["XLA_FLAGS"] = f"{present} {CPU_FLAG}".strip()
  flags.mark_flags_as_required(required)

  def guarded(argv: list[str]) -> Any:
    try:
      if len(argv) > 1 and not (words and flags.FLAGS[words].value):
        raise InputError(f"unexpected argument {argv[1]!r}")
      return main(argv)
    except InputError as error:
      refuse(error)

  app.run(guarded, flags_parser=parse_flags)


def refuse(error: Exception | str) -> None:
  """Prints one line and exits with status 2."""
  print(f"error: {error}", file=sys.stderr)
  sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parsing; a wrong flag or config key is one line.

  An unknown config key is refused with the nearest known one.
  """
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # ml_collections wraps the error of a config file in its traceback.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    refuse(re.sub(r"^avjax\.errors\.InputError: ", "", lines[-1]))
  except (AttributeError, KeyError, TypeError) as error:
    text = str(error.args[0] if error.args else error)
    near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
    bad = near.group(2) if near else text.strip("'\" ")
    flag = next((a for a in argv if bad in a.split("=")[0]), "--config")
    hint = f" Did you mean {near.group(1)!r}?" if near else ""
    refuse(
      f"{flag}: no config key {bad!r} there.{hint} ({type(error).__name__})"
    )
  return []


def with_demo_data(config: Any) -> Any:
  """Makes and builds av_demo where a config asks for it and it is absent.

  The same for scores of its own objects and for frozen features of it.
  """
  stages = [config[name] for name in config.stages] or [config]
  for stage in stages:
    if stage.data.name == "av_demo":
      from data_prep import av_demo

      path = av_demo.ensure_demo(stage.data)
      if stage.data.object_scores == "truth":
        from data_prep import demo_objects

        made = demo_objects.ensure(stage.data, path)
        stage.data.object_scores = str(made)
      if stage.data.features == "demo":
        from data_prep import demo_features

        stage.data.features = str(demo_features.ensure(stage.data, path))
      if config.stages:
        config.data_dir = str(path)
      else:
        config.data.dir = str(path)
  return config
