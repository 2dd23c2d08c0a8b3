"""Tiny weights under the genuine names and layouts of public checkpoints."""

import numpy as np

BLOCK = {
  "norm1.weight": "d", "norm1.bias": "d",
  "attn.qkv.weight": "3d d", "attn.qkv.bias": "3d",
  "attn.proj.weight": "d d", "attn.proj.bias": "d",
  "norm2.weight": "d", "norm2.bias": "d",
  "mlp.fc1.weight": "f d", "mlp.fc1.bias": "f",
  "mlp.fc2.weight": "d f", "mlp.fc2.bias": "d",
}  # fmt: skip
OWN_NORMS = ("norm1_a", "norm1_v", "norm2_a", "norm2_v")


def block(prefix, d, own_norms=False):
  """Shapes of a PyTorch block; CAV-MAE's has LayerNorms per modality."""
  sizes = {"d": d, "3d": 3 * d, "f": 4 * d}
  found = {
    prefix + name: tuple(sizes[s] for s in shape.split())
    for name, shape in BLOCK.items()
  }
  for name in OWN_NORMS if own_norms else ():
    found |= {f"{prefix}{name}.weight": (d,), f"{prefix}{name}.bias": (d,)}
  return found


def cavmae_shapes(
  d=32, depth=11, decoder=(32, 2), classes=0, tokens=(512, 196)
):
  """CAV-MAE's state dict without `module.`; classes > 0 = fine-tuned."""
  shapes = {}
  for m, n, channels in zip("av", tokens, (1, 3), strict=True):
    shapes |= {
      f"modality_{m}": (1, 1, d), f"pos_embed_{m}": (1, n, d),
      f"patch_embed_{m}.proj.weight": (d, channels, 16, 16),
      f"patch_embed_{m}.proj.bias": (d,),
      f"norm_{m}.weight": (d,), f"norm_{m}.bias": (d,),
    }  # fmt: skip
    for i in range(depth):
      shapes |= block(f"blocks_{m}.{i}.", d, True)
  shapes |= block("blocks_u.0.", d, True)
  shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
  if classes:
    shapes |= {"mlp_head.0.weight": (d,), "mlp_head.0.bias": (d,)}
    shapes |= {"mlp_head.1.weight": (classes, d), "mlp_head.1.bias": (classes,)}
    return shapes
  e, blocks = decoder
  for m, n, pixels in zip("av", tokens, (256, 768), strict=True):
    shapes |= {
      f"decoder_modality_{m}": (1, 1, e), f"decoder_pos_embed_{m}": (1, n, e),
      f"decoder_pred_{m}.weight": (pixels, e),
      f"decoder_pred_{m}.bias": (pixels,),
    }  # fmt: skip
  for i in range(blocks):
    shapes |= block(f"decoder_blocks.{i}.", e, True)
  return shapes | {
    "mask_token": (1, 1, e), "decoder_embed.weight": (e, d),
    "decoder_embed.bias": (e,), "decoder_norm.weight": (e,),
    "decoder_norm.bias": (e,),
  }  # fmt: skip


def draw(shapes, tables=None, seed=1234):
  """Values by the golden numbers' recipe: sorted names, one generator.

  Args:
    shapes: by name.
    tables: arrays that are not drawn, by name.
    seed: of the generator.
  """
  rng, state = np.random.default_rng(seed), {}
  for name, shape in sorted(shapes.items()):
    if name in (tables or {}):
      state[name] = np.asarray(tables[name], np.float32).reshape(shape)
      continue
    z = rng.standard_normal(shape)
    if not name.endswith(".weight"):
      z = 0.05 * z
    elif len(shape) == 1:
      z = 1 + 0.05 * z
    else:
      z = z / np.sqrt(np.prod(shape[1:]))
    state[name] = z.astype(np.float32)
  return state


def cavmae(tables, **sizes):
  """CAV-MAE by the recipe; `tables` are its position tables."""
  shapes = cavmae_shapes(**sizes)
  return draw(shapes, {k: v for k, v in tables.items() if k in shapes})


def vit_torch(d=32, depth=2, side=14, classes=5):
  """timm's ViT; classes 0 = without a head."""
  shapes = {
    "cls_token": (1, 1, d), "pos_embed": (1, side * side + 1, d),
    "patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,),
    "norm.weight": (d,), "norm.bias": (d,),
  }  # fmt: skip
  for i in range(depth):
    shapes |= block(f"blocks.{i}.", d)
  if classes:
    shapes |= {"head.weight": (classes, d), "head.bias": (classes,)}
  return draw(shapes)


def mae(d=32, depth=2, decoder=(24, 1), side=14):
  """MAE; decoder None = the file of the encoder alone."""
  state = vit_torch(d, depth, side, classes=0)
  state["pos_embed"][0, 0] = 0
  if decoder is None:
    return state
  e, blocks = decoder
  shapes = {
    "mask_token": (1, 1, e), "decoder_pos_embed": (1, side * side + 1, e),
    "decoder_embed.weight": (e, d), "decoder_embed.bias": (e,),
    "decoder_norm.weight": (e,), "decoder_norm.bias": (e,),
    "decoder_pred.weight": (768, e), "decoder_pred.bias": (768,),
  }  # fmt: skip
  for i in range(blocks):
    shapes |= block(f"decoder_blocks.{i}.", e)
  return state | draw(shapes, seed=5)


def vit_npz(torch_state, heads=2):
  """The same ViT as the JAX release's file holds it."""
  d = torch_state["cls_token"].shape[-1]
  state = {
    "cls": torch_state["cls_token"],
    "Transformer/posembed_input/pos_embedding": torch_state["pos_embed"],
    "embedding/kernel": torch_state["patch_embed.proj.weight"].transpose(
      2, 3, 1, 0
    ),
    "embedding/bias": torch_state["patch_embed.proj.bias"],
    "Transformer/encoder_norm/scale": torch_state["norm.weight"],
    "Transformer/encoder_norm/bias": torch_state["norm.bias"],
    "head/kernel": torch_state["head.weight"].T,
    "head/bias": torch_state["head.bias"],
  }
  for i in range(sum(n.endswith("norm1.bias") for n in torch_state)):
    ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
    inner = theirs + "MultiHeadDotProductAttention_1/"
    for n, m in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
      state[f"{theirs}{m}/scale"] = torch_state[f"{ours}{n}.weight"]
      state[f"{theirs}{m}/bias"] = torch_state[f"{ours}{n}.bias"]
    for n, m in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
      place = f"{theirs}MlpBlock_3/{m}/"
      state[f"{place}kernel"] = torch_state[f"{ours}mlp.{n}.weight"].T
      state[f"{place}bias"] = torch_state[f"{ours}mlp.{n}.bias"]
    kernels = np.split(torch_state[f"{ours}attn.qkv.weight"], 3)
    biases = np.split(torch_state[f"{ours}attn.qkv.bias"], 3)
    for part, kernel, bias in zip(
      ("query", "key", "value"), kernels, biases, strict=True
    ):
      state[f"{inner}{part}/kernel"] = kernel.T.reshape(d, heads, -1)
      state[f"{inner}{part}/bias"] = bias.reshape(heads, -1)
    out = torch_state[f"{ours}attn.proj.weight"].T
    state[f"{inner}out/kernel"] = out.reshape(heads, -1, d)
    state[f"{inner}out/bias"] = torch_state[f"{ours}attn.proj.bias"]
  return state


def convnext(channels, classes=309):
  """A tiny ConvNeXt: under torchvision's names, and its parameters."""
  import jax

  from avjax.nn import convnext as net
  from avjax.weights import convnext as names

  size = net.Size(8, (1, 1, 2, 1))  # LayerNorm of 2 magnifies rounding
  width = size.channels
  x = np.zeros((1, 32, 32, channels), np.float32)
  shapes = jax.eval_shape(net.ConvNeXt(size).init, jax.random.key(0), x)
  shapes = shapes["params"]
  shapes["classifier"] = {
    "norm": {k: np.zeros(width) for k in ("scale", "bias")},
    "out": {"kernel": np.zeros((width, classes)), "bias": np.zeros(classes)},
  }
  rng = np.random.default_rng(channels)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes
  )
  return names.to_reference(params), params
