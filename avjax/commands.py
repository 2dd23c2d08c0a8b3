"""What the command-line programs share: errors in one line, demo data."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from avjax import allocator
from avjax.errors import InputError, SaveError

# Before JAX starts: a few per cent on CPUs with AVX-512, nothing elsewhere.
CPU_FLAG = "--xla_cpu_prefer_vector_width=512"
# Of compiled programs on disk; the oldest go first.
CACHE_BYTES = 4 << 30


def run(
  main: Callable[[list[str]], Any],
  required: Sequence[str] = (),
  words: str | bool = "",
  *,
  cache: bool = True,
) -> None:
  """`app.run`, but an InputError is one line and exit status 2.

  Args:
    main: given the program's name and the words that are no flags.
    required: flags that have to be given.
    words: the flag with which there may be such words; True = always.
    cache: whether compiled programs are kept, see `keep_compiled`; commands
      that time compiling neither keep nor take them.
  """
  if cache:
    keep_compiled()
  elif "JAX_ENABLE_COMPILATION_CACHE" not in os.environ:
    _set_jax(jax_enable_compilation_cache=False)
  allocator.keep()
  present = os.environ.get("XLA_FLAGS", "")
  if CPU_FLAG.split("=")[0] not in present:
    os.environ["XLA_FLAGS"] = f"{present} {CPU_FLAG}".strip()
  flags.mark_flags_as_required(required)

  def guarded(argv: list[str]) -> Any:
    try:
      allowed = words if words in (True, "") else flags.FLAGS[words].value
      if len(argv) > 1 and not allowed:
        raise InputError(f"unexpected argument {argv[1]!r}")
      return main(argv)
    except (InputError, SaveError) as error:
      refuse(error)

  app.run(guarded, flags_parser=parse_flags)


def keep_compiled() -> None:
  """Has JAX keep compiled programs for the next start.

  They are in `~/.cache/avjax`, up to CACHE_BYTES. JAX_COMPILATION_CACHE_DIR
  names another folder, JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(base) / "avjax" / f"compiled-{processor()}"
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    most = int(os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE", CACHE_BYTES))
    _set_jax(
      jax_compilation_cache_dir=str(folder),
      jax_compilation_cache_max_size=most,
    )


def _set_jax(**options: str | int) -> None:
  """Sets options of JAX for this process and those it starts.

  JAX reads the environment when it is imported, and may have been.
  """
  os.environ.update({k.upper(): str(v) for k, v in options.items()})
  if "jax" in sys.modules:
    for name, value in options.items():
      sys.modules["jax"].config.update(name, value)


def processor() -> str:
  """Eight digits that tell kinds of CPU apart.

  A home folder may be that of several machines, and a program that was
  compiled for one CPU ends another one's process.
  """
  told = [platform.machine(), platform.processor()]
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    told += [x for x in lines if x.startswith(("model name", "flags"))][:2]
  return hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]


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
    flag = next((a for a in argv if bad in _words(a)), "--config")
    hint = f" Did you mean {near.group(1)!r}?" if near else ""
    refuse(
      f"{flag}: no config key {bad!r} there.{hint} ({type(error).__name__})"
    )
  return []


def _words(flag: str) -> list[str]:
  """Of --config.data.name=x: config, data and name."""
  return flag.split("=")[0].lstrip("-").split(".")


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
