"""Simulated devices, checked annotations and one tiny data set for all."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

import pytest
from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401 - named in the hook below
from tests import runs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices for every test: meshes are chosen by config.
os.environ.setdefault("XLA_FLAGS", runs.xla_flags(devices=8))

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # What one test process compiled the others need not compile again.
  folder = tempfile.mkdtemp(prefix="avjax-compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  # Also for commands that time compiling, and take no program from elsewhere.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
  atexit.register(shutil.rmtree, folder, ignore_errors=True)

# Shapes in signatures are checked under pytest, and only here.
install_import_hook(["avjax"], "tests.typechecker.check")

# Minutes long, in one test each.
LONG = ("test_readme.py", "test_colab.py")
# Bytes from which on a process forgets what it has compiled.
LARGE = 3 * 2**30


def pytest_collection_modifyitems(items):
  """Begins with long tests, so that no process waits for one at the end."""
  items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
  """What is imported stays; searching it took half of the collector's time."""
  gc.collect()
  gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Halves of the files each; who has ended first takes from the others."""
  from xdist.scheduler import WorkStealingScheduling

  if config.getvalue("dist") != "load":
    return None  # another was asked for
  return WorkStealingScheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def memory():
  """Keeps a process small; its programs would stay to the end."""
  yield
  used = pathlib.Path("/proc/self/statm")
  if used.exists():
    pages = int(used.read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > LARGE:
      import jax

      jax.clear_caches()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
  """The data_dir of a tiny av_demo, built once for all test processes."""
  from avjax import config
  from data_prep import av_demo

  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  section = config.data_section()
  section.dir = str(base / "avjax_data")
  section.demo.update(runs.DEMO)
  folder = str(pathlib.Path(av_demo.ensure_demo(section)))
  section.variant = "frames10"  # CAV-MAE's, from the same media files
  av_demo.ensure_demo(section)
  return folder
