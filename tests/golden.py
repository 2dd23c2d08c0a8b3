"""Golden numbers of the public AV-MAE and MBT code, and how to compare.

The files in `tests/data` hold outputs of the public implementation
(google-research/scenic 4a38d475, float32, CPU) on weights and inputs that the
recipe below makes, so neither weights nor inputs are stored.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"

# Measured differences between float32 and float64 runs of the public code are
# several times smaller. These are never relaxed.
FORWARD = {"rtol": 0, "atol": 1e-5}
LOSS = {"rtol": 1e-5, "atol": 0}
GRAD_NORM = {"rtol": 1e-4, "atol": 1e-6}
PARAM_NORM = {"rtol": 1e-5, "atol": 1e-9}
POSITIONS = {"rtol": 0, "atol": 1e-6}

Arrays = Mapping[str, np.ndarray]


def load(name: str) -> dict[str, np.ndarray]:
  """Every array of `tests/data/<name>`, such as 'mae/mid_dshared/enc_rgb'."""
  with np.load(DATA / name) as file:
    return dict(file)


def config(file: Arrays) -> dict:
  """Sizes, ratios and seeds of the file's models."""
  return json.loads(str(file["config_json"]))


def reference_params(
  file: Arrays, tag: str, seed: int | None = None
) -> dict[str, np.ndarray]:
  """Weights under the public names, drawn by the recipe and checked.

  Args:
    file: of `load`.
    tag: model, such as 'mae/mid_dshared'; it has `param_paths`.
    seed: of the generator; None = the file's own.
  """
  rng = np.random.default_rng(config(file)["wseed"] if seed is None else seed)
  params = {}
  for path, text in zip(
    file[f"{tag}/param_paths"], file[f"{tag}/param_shapes"], strict=True
  ):
    shape = tuple(int(size) for size in str(text).split(","))
    params[str(path)] = _value(str(path), shape, rng)
  if f"{tag}/param_norms" in file and seed is None:
    norms = [np.linalg.norm(v.astype(np.float64)) for v in params.values()]
    np.testing.assert_allclose(norms, file[f"{tag}/param_norms"], rtol=1e-12)
  return params


def _value(path: str, shape: tuple, rng: np.random.Generator) -> np.ndarray:
  z = rng.standard_normal(shape)
  *_, parent, last = ("", *path.split("/"))
  if last == "scale":
    value = 1 + 0.05 * z
  elif last == "kernel":
    projects = parent in ("query", "key", "value")
    value = z / np.sqrt(shape[0] if projects else np.prod(shape[:-1]))
  else:
    value = 0.05 * z
  return value.astype(np.float32)


def inputs(file: Arrays) -> dict[str, np.ndarray]:
  """`rgb` [b t h w 3], `spectrogram` [b t f], `cls`, `multi`, `head_a/b`."""
  sizes = config(file)
  rng = np.random.default_rng(sizes["iseed"])
  b, classes, splits = sizes["batch"], sizes["classes"], sizes["splits"]
  made = {
    "rgb": rng.uniform(-1, 1, (b, *sizes["rgb"])).astype(np.float32),
    "spectrogram": rng.standard_normal((b, *sizes["spec"])).astype(np.float32),
    "cls": rng.integers(0, classes, b),
    "multi": (rng.random((b, classes)) < 0.3).astype(np.float32),
    "head_a": rng.integers(0, splits[0], b),
    "head_b": rng.integers(0, splits[1], b),
  }
  for name in ("rgb", "spectrogram"):
    first = made[name].reshape(-1)[:8]
    np.testing.assert_array_equal(first, file[f"inputs/{name}_first8"])
  for name in ("cls", "multi", "head_a", "head_b"):
    np.testing.assert_array_equal(made[name], file[f"inputs/{name}"])
  return {**made, "spectrogram": made["spectrogram"][..., 0]}


def noise(kept: np.ndarray, n: int) -> np.ndarray:
  """Masking noise [b n] that keeps `kept` [b k] in exactly that order."""
  made = np.ones((len(kept), n), np.float32)
  ranks = np.arange(kept.shape[1], dtype=np.float32) / (n + 1)
  np.put_along_axis(made, kept, np.broadcast_to(ranks, kept.shape), 1)
  return made


def norms(params: Mapping[str, np.ndarray], paths) -> np.ndarray:
  """Float64 L2 norms of a flat dict, in the order of `paths`."""
  assert set(params) == {str(path) for path in paths}
  return np.array(
    [np.linalg.norm(np.asarray(params[str(p)], np.float64)) for p in paths]
  )


def assert_grad_norms(grads: Mapping[str, np.ndarray], file: Arrays, tag: str):
  """Gradients under the public names against `<tag>/grad_norms`.

  A key bias has no gradient (softmax does not see a shift); what is stored
  for it is rounding noise, so below 1e-6 counts as zero.
  """
  paths = file[f"{tag}/param_paths"]
  np.testing.assert_allclose(
    norms(grads, paths), file[f"{tag}/grad_norms"], **GRAD_NORM
  )


def assert_param_norms(
  params: Mapping[str, np.ndarray], file: Arrays, tag: str, name: str
):
  """Parameters after training against `<tag>/<name>`, but for key biases."""
  paths = file[f"{tag}/param_paths"]
  told = np.array([not str(path).endswith("key/bias") for path in paths])
  np.testing.assert_allclose(
    norms(params, paths)[told], file[f"{tag}/{name}"][told], **PARAM_NORM
  )
