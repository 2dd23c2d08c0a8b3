"""AVSiam against the public Base code, and its checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import config as config_lib
from avjax import convert, losses, trees
from avjax.errors import InputError
from avjax.nn import cav_encoder, siam_encoder, transformer
from avjax.weights import avsiam, families, formats, image, vit
from tests import avsiam_golden as made
from tests import public_weights
from tests.avsiam_golden import GRAD_NORM, LOSS, VALUES

MODALITIES = ("audio", "video")
KEY = jax.random.key(0)


def close(ours, name, tolerance=VALUES):
  np.testing.assert_allclose(ours, made.file()[name], **tolerance)


@functools.cache
def stacked():
  """The public weights, ready for a scan."""
  params, _ = made.weights("pre")
  return transformer.stack_layers(jax.tree.map(jnp.asarray, params))


# --- The public code ---------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def contrast(params, inputs, double=True):
  method = made.pretraining()
  module = method.autoencoder(inputs).clone(double=double)
  kept = method.draw(inputs, KEY, tuple(method.model.ratios))
  pooled = method.apply(module, params, inputs, kept, False)["pooled"]
  removed = {m: slots.removed() for m, slots in kept.items()}
  return method.contrast(pooled, inputs), pooled, removed


@pytest.mark.parametrize("double", [True, False])
def test_contrast_equals_the_public_code(double):
  inputs = made.inputs()["contrast"]
  (loss, accuracy), pooled, removed = contrast(stacked(), inputs, double)
  prefix = "" if double else "nodouble_"
  close(loss, f"{prefix}con_loss", LOSS)
  for m in MODALITIES:
    close(pooled[m], f"{prefix}con_feat_{m[0]}")
    assert np.array_equal(1 - removed[m], made.file()[f"con_kept_{m[0]}"])
  if not double:
    return
  assert accuracy == made.file()["con_acc"]
  units = {m: losses.unit(x) for m, x in pooled.items()}
  cosines = units["audio"] @ units["video"].T
  close(cosines, "con_similarity", {"rtol": 0, "atol": 5e-6})
  one_way = losses.contrastive(pooled["video"], pooled["audio"], 0.05)
  close(one_way[0], "con_loss_over_audio_axis", LOSS)
  assert one_way[1] == made.file()["con_acc_over_audio_axis"]


def reconstruction(params, inputs, one_encoder=False):
  method = made.pretraining()
  module = method.autoencoder(inputs)
  second, ratios, ending, _, _ = method.passes(module)[-1]
  kept = method.draw(inputs, KEY, ratios, ending)
  run = module if one_encoder else second
  out = method.apply(run, params, inputs, kept)
  removed = {m: kept[m].removed() for m in kept}
  rows, seen = method.errors(out["prediction"], inputs, removed)
  found = {f"loss_{m}": losses.mean_error(rows[f"errors/{m}"]) for m in kept}
  return sum(found.values()), (found, out, seen)


def compare(total, found, out, prefix):
  both = [total, found["loss_audio"], found["loss_video"]]
  close(both, f"{prefix}losses_total_audio_video", LOSS)
  for m in MODALITIES:
    close(out["pooled"][m], f"{prefix}encoded_{m[0]}_mean")
    close(out["multimodal"][m].mean(1), f"{prefix}after_mm_mean_{m[0]}")
  close(out["prediction"]["audio"][:, ::31, ::5], f"{prefix}pred_a_sample")
  close(out["prediction"]["video"][:, ::13, ::7], f"{prefix}pred_v_sample")


def test_reconstruction_and_gradients_equal_the_public_code():
  run = jax.jit(jax.value_and_grad(reconstruction, has_aux=True))
  (total, (found, out, seen)), grads = run(stacked(), made.inputs()["mae"])
  compare(total, found, out, "mae_")
  for m in MODALITIES:
    assert np.array_equal(
      seen[f"removed/{m}"], made.file()[f"mae_masked_{m[0]}"]
    )
  grads = transformer.unstack_layers(jax.device_get(grads))
  flat = avsiam.to_reference(grads, prefix="")
  names = [str(key) for key in made.file()["pre_keys"]]
  expected = made.file()["mae_grad_norms"]
  # No gradient in the public code: none here, or no parameter.
  told = {k: v for k, v in zip(names, expected, strict=True) if v == v}
  norms = {k: np.linalg.norm(x.astype(np.float64)) for k, x in flat.items()}
  assert not any(v for k, v in norms.items() if k in names and k not in told)
  for key, norm in told.items():
    np.testing.assert_allclose(norms[key], norm, **GRAD_NORM, err_msg=key)


def test_one_encoder_for_both_equals_the_public_modules():
  run = jax.jit(reconstruction, static_argnums=2)
  total, (found, out, _) = run(stacked(), made.inputs()["mae"], True)
  compare(total, found, out, "mae_one_encoder_")


def test_blocks_equal_the_public_code():
  """Without masks: encoder input, every block, the last LayerNorm."""
  method = made.pretraining()
  clips = {k: made.inputs()["mae"][k] for k in ("fbank", "frames")}
  parts = (("_audio", (512,)), ("_video", (196,)))
  module = siam_encoder.SiamBlock(parts, 12, 3072, 1e-5)

  @jax.jit
  def run(params, inputs):
    patches = cav_encoder.patches(inputs, method.model)
    tokens = []
    for m in MODALITIES:
      layer, table = params[f"embed_{m}"], params[f"positions_{m}"]
      x = patches[m] @ layer["kernel"] + layer["bias"] + table
      tokens.append(2 * x)

    def block(x, layer):
      x = module.apply({"params": layer}, x)
      return x, means(x)

    first, encoder = jnp.concatenate(tokens, axis=1), params["encoder"]
    x, trace = jax.lax.scan(block, first, encoder["blocks"])
    last = siam_encoder.SiamStack(0, parts, 12, 3072, 1e-5)
    return tokens, trace, means(last.apply({"params": encoder}, x))

  def means(x):
    return x[:, :512].mean(1), x[:, 512:].mean(1)

  tokens, trace, last = run(stacked(), clips)
  close(tokens[0][:, ::61, ::37], "embed_a_doubled_sample")
  close(tokens[1][:, ::23, ::37], "embed_v_doubled_sample")
  for m, x, mean in zip("av", trace, last, strict=True):
    close(x.swapaxes(0, 1)[:, :, ::16], f"trace_{m}")
    close(mean, f"unmasked_{m}_mean")


# --- Public weights ----------------------------------------------------------


def tiny(name, decoder=8, second=True):
  """A state dict with every public name, of width 8 and two blocks."""
  sizes = {768: 8, 512: 4, 2304: 24, 3072: 16, 1536: 12, 2048: 8, 21843: 3}
  keys, shapes = (list(map(str, made.file()[f"{name}_{x}"])) for x in
                  ("keys", "shapes"))  # fmt: skip
  if name == "pre":
    more = ("keys", "shapes")
    keys, shapes = (
      a + list(map(str, made.file()[f"pre_unused_{x}"]))
      for a, x in zip((keys, shapes), more, strict=True)
    )
  rng, state = np.random.default_rng(3), {}
  for key, text in sorted(zip(keys, shapes, strict=True)):
    block = key.split(".")
    number = next((int(x) for x in block if x.isdigit()), 0)
    last = decoder if key.startswith("decoder_blocks") else 2
    if number >= last or (key.startswith("ast_base") and not second):
      continue
    shape = tuple(sizes.get(int(n), int(n)) for n in text.split(","))
    if key.startswith("mlp_head_mm.") and shape[-1] == 12:
      shape = (*shape[:-1], 16)
    if "head_a" not in key and "pred" in key:
      shape = (int(text.split(",")[0]), *shape[1:])
    state[key] = rng.standard_normal(shape).astype(np.float32)
  for key in [key for key in state if key.startswith("vit_base.blocks.")]:
    if name == "pre":
      state[key.replace("vit_base.blocks.", "my_blocks.")] = state[key]
  return state


@pytest.mark.parametrize(
  "name, prefix, decoder, second",
  [
    ("pre", "module.", 8, True),
    ("pre", "", 6, False),
    ("ft", "module.", 8, True),
  ],
)
def test_round_trip_is_exact(name, prefix, decoder, second):
  state = tiny(name, decoder, second)
  named = {prefix + key: x for key, x in state.items()}
  params, aside = avsiam.to_house(named)
  back = avsiam.to_reference(params, aside, prefix=prefix)
  assert all(np.array_equal(back[key], x) for key, x in named.items())
  more = {k.removeprefix(prefix) for k in set(back) - set(named)}
  assert all(key.startswith("my_blocks.") for key in more)
  assert len(params["encoder"]) == 2 + 2
  assert ("encoder_mae_audio" in params) == (name == "pre" and second)
  if name == "pre":
    blocks = [key for key in params["decoder"] if key.startswith("block_")]
    assert len(blocks) == decoder


def test_names_are_those_of_the_model():
  """Whatever the model has, and nothing else, comes out of a file."""
  method, inputs = made.pretraining(), made.inputs()["mae"]
  shapes = jax.eval_shape(method.init, KEY, inputs)
  ours = jax.tree.map(lambda x: x.shape, shapes)
  params, aside = made.weights("pre")
  assert jax.tree.map(lambda x: x.shape, params) == ours
  # Unused LayerNorms: 12 x 4, 12 x 8, 2 x 8, 8 x 8; and a row of positions.
  assert len(aside) == 48 + 96 + 16 + 64 + 1


@pytest.mark.parametrize(
  "change, words",
  [
    ({"vit_base.blocks.0.attn.qvk.weight": np.zeros((24, 8))},
     "1 of .*nearest: 'vit_base.blocks.0.attn.qkv.weight'"),
    ({"vit_base.blocks.1.mlp.fc1.weight": np.zeros((16, 4))},
     r"has shape \(16, 4\); expected \(16, 8\)"),
    ({"my_blocks.1.attn.qkv.bias": np.zeros(24)}, "are one parameter"),
  ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(change, words):
  state = tiny("pre")
  if "mlp" in next(iter(change)):
    state = {k: x for k, x in state.items() if not k.startswith("my_blocks")}
  with pytest.raises(InputError, match=words):
    avsiam.to_house({**state, **change})


def test_file_is_recognised_and_comes_back(tmp_path):
  state = tiny("pre")
  named = {f"module.{key}": x for key, x in state.items()}
  formats.write(tmp_path / "in.safetensors", named)
  report = convert.convert(
    tmp_path / "in.safetensors", tmp_path / "out.npz", layout="public"
  )
  assert report.family == "avsiam" and not report.missing
  back = formats.read(tmp_path / "out.npz")
  assert set(back) == set(named)
  assert all(np.array_equal(back[key], x) for key, x in named.items())


@pytest.mark.parametrize("decoder, second", [(8, True), (6, False)])
def test_published_file_brings_its_config(decoder, second):
  """Full size: shapes alone, no memory."""
  model = {"decoder_depth": decoder}
  method, inputs = made.pretraining(**model), made.inputs()["mae"]
  blank = jax.tree.map(
    lambda x: np.broadcast_to(x.dtype.type(), x.shape),
    jax.eval_shape(method.init, KEY, inputs),
  )
  if not second:
    del blank["encoder_mae_audio"]
  weights = families.Weights("avsiam", "avsiam", blank, {}, None, ())
  found = config_lib.from_plain(families.config_of(weights)).model
  expected = {"scan": False, "decoder_depth": decoder, "public_base": second}
  assert found.to_dict() == {**method.model.to_dict(), **expected}


@pytest.mark.parametrize("public", [True, False])
def test_image_model_starts_it(public):
  sizes = {"width": 32, "depth": 4, "heads": 4, "mlp": 128}
  sizes |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
  method = made.pretraining(public_base=public, scan=False, **sizes)
  source = vit.to_image(public_weights.vit_torch(32, 4))
  inputs = made.inputs()["mae"]
  shapes = jax.eval_shape(method.init, KEY, inputs)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  loaded = image.start(params, source, method.config)
  flat, origin = trees.flatten(loaded.params), trees.flatten(source)
  np.testing.assert_allclose(
    flat["embed_audio/kernel"],
    origin["embed/kernel"].mean(2).reshape(256, 32),
    rtol=1e-6,
  )
  for block, own in (("00", "02"), ("01", "03")):
    path = "attention/qkv/kernel"
    assert loaded.loaded[f"multimodal/block_{block}/{path}"] == (
      f"encoder/block_{own}/{path}"
    )
  # Corners of the picture are those of the spectrogram.
  places = flat["positions_audio"].reshape(8, 64, 32)
  corners = origin["positions"].reshape(14, 14, 32)
  np.testing.assert_allclose(places[::7, ::63], corners[::13, ::13], rtol=1e-6)
  assert all(
    path.startswith(("decoder", "mask_token", "head_"))
    for path in loaded.missing
  )
  assert not [x for x in loaded.unused if x.startswith(("encoder", "embed"))]


def test_parameters_without_a_public_place_are_refused():
  with pytest.raises(InputError, match="no place for 'encoder/norm/scale'"):
    avsiam.to_reference({"encoder": {"norm": {"scale": np.ones(4)}}})
