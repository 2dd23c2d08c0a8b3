"""CAV-MAE's masks and its contrastive loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import losses
from avjax.errors import InputError
from avjax.methods import cavmae as method_lib
from avjax.nn import masking
from tests import cavmae_golden as made

KEY = jax.random.key(0)

# --- Masking -----------------------------------------------------------------


def test_structured_masking():
  noise = jnp.full((2, 8), 0.5)
  keys = masking.example_keys(KEY, jnp.arange(2, dtype=jnp.uint32))
  lines = masking.whole_lines(noise, keys, (2, 4), rows=0, columns=3)
  grid = np.asarray(lines).reshape(2, 2, 4)
  for example in grid:
    assert sorted(example[0].tolist()) == [0.5, 1.5, 1.5, 1.5]
    assert np.array_equal(example[0], example[1])
  lines = masking.whole_lines(noise, keys, (2, 4), rows=1, columns=1)
  grid = np.asarray(lines).reshape(2, 2, 4) > 1
  assert (grid.all(2).sum(1) == 1).all() and (grid.all(1).sum(1) == 1).all()
  assert (grid.sum((1, 2)) == 5).all()


@pytest.mark.parametrize(
  "kind, rows, columns",
  [
    ("time", 0, 48), ("frequency", 6, 0), ("time_frequency", 4, 33),
  ],
)  # fmt: skip
def test_masks_of_a_whole_clip(kind, rows, columns):
  method = made.pretraining(masking=kind)
  assert method_lib.lines(kind, (8, 64), 0.75) == (rows, columns)
  b = 5
  inputs = {
    "fbank": jnp.zeros((b, 1024, 128)),
    "frames": jnp.zeros((b, 1, 224, 224, 3)),
    "index": jnp.arange(7, 7 + b, dtype=jnp.uint32),
  }
  draw = jax.jit(method.draw)
  ids = draw(inputs, KEY)
  # The number kept is the same in every mode.
  assert ids["audio"].shape == (b, 128) and ids["video"].shape == (b, 49)
  removed = masking.removed(ids["audio"], 512).reshape(b, 8, 64)
  whole = [np.asarray(removed.all(axis).sum(1)) for axis in (2, 1)]
  if kind != "time_frequency":
    assert (whole[0] >= rows).all() and (whole[1] >= columns).all()
  else:
    # 124 tokens lie outside 4 rows and 33 columns; 4 more are kept.
    assert (whole[0] <= 4).all() and (whole[1] >= 29).all()
  assert len({row.tobytes() for row in np.asarray(removed)}) > 2
  # Elsewhere in a batch, an example keeps its mask.
  back = draw({k: v[::-1] for k, v in inputs.items()}, KEY)
  assert np.array_equal(back["audio"][::-1], ids["audio"])


# --- Contrastive loss --------------------------------------------------------


def vectors(b, d=5):
  rng = np.random.default_rng(3)
  return [jnp.asarray(rng.standard_normal((b, d)), jnp.float32) for _ in "av"]


def test_contrastive_loss_by_hand():
  anchors = jnp.array([[2.0, 0.0], [0.0, 3.0]])
  candidates = jnp.array([[1.0, 0.0], [1.0, 1.0]])
  loss, accuracy = losses.contrastive(anchors, candidates, 0.5)
  half = np.sqrt(0.5)
  first = np.log(np.exp(2) + np.exp(2 * half)) - 2
  second = np.log(1 + np.exp(2 * half)) - 2 * half
  np.testing.assert_allclose(loss, (first + second) / 2, rtol=1e-6)
  assert accuracy == 1
  _, accuracy = losses.contrastive(anchors, candidates[::-1], 0.5)
  assert accuracy == 0


@pytest.mark.parametrize("two_way", [False, True])
def test_groups_and_missing_examples(two_way):
  video, audio = vectors(6)
  run = functools.partial(losses.contrastive, temperature=0.05, two_way=two_way)
  run = jax.jit(run, static_argnames="group_size")
  grouped = run(video, audio, group_size=3)
  parts = [run(video[i : i + 3], audio[i : i + 3]) for i in (0, 3)]
  np.testing.assert_allclose(grouped, np.mean(parts, 0), rtol=1e-5)
  # Neither row nor column, whatever stands there.
  there = jnp.array([True, True, False, True, False, True])
  rest = np.flatnonzero(there)
  without = run(video[rest], audio[rest])
  zeros = [jnp.where(there[:, None], x, 0.0) for x in (video, audio)]
  for vectors_ in ((video, audio), zeros):
    np.testing.assert_allclose(
      run(*vectors_, weights=there), without, rtol=1e-5
    )
  nobody = jnp.zeros(6, bool)
  for weights in (there, nobody):
    grads = jax.grad(lambda *x, w=weights: run(*x, weights=w)[0], (0, 1))(
      *zeros
    )
    assert all(np.isfinite(g).all() for g in grads)
  assert run(video, audio, weights=nobody)[0] == 0


def test_group_that_does_not_divide_is_refused():
  with pytest.raises(InputError, match="batch size 6 .* model.group_size 4"):
    losses.contrastive(*vectors(6), 0.05, group_size=4)
