"""What every command does before JAX starts."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from avjax import allocator, commands
from tests import runs

KEYS = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE")


@pytest.fixture
def home(monkeypatch, tmp_path):
  """A folder for caches, and an environment that says nothing of JAX's."""
  for key in KEYS:
    # Set first, so that what a test sets is undone where nothing was.
    monkeypatch.setenv(key, "")
    monkeypatch.delenv(key)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  before = {key: getattr(jax.config, key.lower()) for key in KEYS}
  yield tmp_path
  for key, value in before.items():
    jax.config.update(key.lower(), value)


def test_compiled_programs_are_kept_per_kind_of_cpu(home, monkeypatch):
  commands.keep_compiled()
  folder, most = (os.environ[key] for key in KEYS)
  assert pathlib.Path(folder).parent == home / "avjax"
  assert int(most) == commands.CACHE_BYTES
  monkeypatch.setattr(commands.platform, "machine", lambda: "other")
  del os.environ[KEYS[0]]
  commands.keep_compiled()
  assert os.environ[KEYS[0]] != folder


@pytest.mark.parametrize(
  "name", ["main", "evaluate", "embed", "plan", "convert", "compare"]
)
def test_jax_knows_the_folder_whenever_it_was_imported(name, tmp_path):
  code = (
    f"import avjax.{name}\n"
    "from avjax import commands\n"
    "commands.keep_compiled()\n"
    "import jax\n"
    "print(jax.config.jax_compilation_cache_dir)\n"
    "print(jax.config.jax_compilation_cache_max_size)\n"
  )
  env = {k: v for k, v in os.environ.items() if k not in KEYS}
  done = subprocess.run(
    [sys.executable, "-c", code],
    env={**env, "XDG_CACHE_HOME": str(tmp_path)},
    cwd=runs.ROOT, check=True, capture_output=True, text=True,
  )  # fmt: skip
  folder, most = done.stdout.split()
  assert folder.startswith(str(tmp_path)) and int(most) == commands.CACHE_BYTES


def test_a_folder_that_is_named_is_left_alone(home, monkeypatch):
  monkeypatch.setenv(KEYS[0], "elsewhere")
  commands.keep_compiled()
  assert os.environ[KEYS[0]] == "elsewhere" and KEYS[1] not in os.environ


def test_without_a_place_nothing_is_kept(home, monkeypatch):
  (home / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
  commands.keep_compiled()
  assert not any(key in os.environ for key in KEYS)


PROGRAM = """
import resource
from avjax import allocator, commands

def main(argv):
  import jax
  import jax.numpy as jnp

  allocator.settle()  # as the loader does

  run = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x))
  x, faults = jnp.ones((2048, 2048)), []
  for _ in range(22):
    run(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
  each = sorted(b - a for a, b in zip(faults, faults[1:]))
  print("faults", each[len(each) // 2])

commands.run(main, cache=False)
"""
PAGES = 2048 * 2048 * 4 // 4096  # of one array


def test_memory_of_a_program_is_kept_for_its_next_run(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as users have
  found = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=runs.ROOT, check=True, capture_output=True, text=True,
  )  # fmt: skip
  assert int(found.stdout.split()[-1]) < PAGES / 10


def test_memory_is_left_alone_beside_a_gpu(monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setattr(allocator.glob, "glob", lambda pattern: [pattern])
  assert not allocator.keep()
