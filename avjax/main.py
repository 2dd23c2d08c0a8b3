"""python -m avjax.main --config=configs/avmae_vgg.py:demo --workdir=DIR

Trains, evaluates and resumes; everything else is in avjax.train.
"""

import pathlib
import sys

from absl import flags, logging
from ml_collections import config_flags

from avjax import commands
from avjax.errors import InputError

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "configs/<name>.py[:argument,…]", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "The run's folder; default runs/<config>."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, for several processes."
)
PROCESSES = flags.DEFINE_integer("processes", 1, "Number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process.")
PROFILE = flags.DEFINE_string(
  "profile", "", "Steps to trace: 10:15 are the tenth to the fourteenth."
)


def main(argv: list[str]) -> None:
  """Parses flags and hands over; kept short."""
  del argv
  logging.set_verbosity(logging.INFO)
  if COORDINATOR.value and PROCESSES.value < 2:
    raise InputError(
      f"--coordinator={COORDINATOR.value} needs --processes, which is "
      f"{PROCESSES.value}"
    )
  if PROCESSES.value > 1:
    import jax

    jax.distributed.initialize(
      COORDINATOR.value, PROCESSES.value, PROCESS_ID.value
    )
  from avjax import train

  config = commands.with_demo_data(CONFIG.value)
  train.train_and_evaluate(
    config, WORKDIR.value or default_workdir(), profile=PROFILE.value
  )


def default_workdir() -> pathlib.Path:
  """runs/<config's name and argument>."""
  text = next(a for a in sys.argv if a.startswith("--config=")).split("=", 1)[1]
  path, _, argument = text.partition(":")
  name = pathlib.Path(path).stem + (f"-{argument}" if argument else "")
  return pathlib.Path("runs") / name.replace(",", "-").replace("=", "_")


if __name__ == "__main__":
  commands.run(main, required=("config",))
