"""CAV-MAE, AVSiam and a block stack in PyTorch, to compare speed with.

They do the work of `avjax.methods.cavmae`, `avjax.methods.avsiam` and
`avjax.nn.transformer` on the same inputs: as many tokens are kept, the same
passes, decoder, heads and losses, to the same values where the parameters are
the same (`load`). They are written as one writes PyTorch: `nn.Linear`, tensors
[b n d], `F.scaled_dot_product_attention`, a loop over AVSiam's mask ratios.
Raw patches are masked before they are embedded, as here.

Only those options exist that the papers' configs use. Parameters have the
house's names, dots for slashes: 'decoder.block_00.norm1.weight'.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from avjax import trees
from avjax.errors import InputError
from avjax.methods import avsiam_config, cavmae_config
from avjax.nn import positions, sizes
from avjax.nn.cav_encoder import EPS, num_kept
from avjax.nn.siam_encoder import LAST_EPS

try:
  import torch
  from torch import nn
  from torch.nn import functional as F
except ModuleNotFoundError as error:
  raise InputError(
    "the comparison with PyTorch needs it: pip install -e '.[torch]'"
  ) from error

Tensor = torch.Tensor
Inputs = Mapping[str, Tensor]  # as a method's `loss` has them
Grids = Mapping[str, tuple[int, int]]  # rows and columns of patches

MODALITIES = {"audio": "fbank", "video": "frames"}


class Attention(nn.Module):
  """Multi-head attention with biases everywhere."""

  def __init__(self, d: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

  def forward(
    self,
    x: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b 1 1 n"] | None = None,
  ) -> Float[Tensor, "b n d"]:
    """Keys count where `mask` is true."""
    b, n, d = x.shape
    qkv = self.qkv(x).view(b, n, 3, self.heads, d // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.out(x.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
  """fc1, exact GELU, fc2."""

  def __init__(self, d: int, hidden: int):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

  def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Applies the MLP."""
    return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
  """A pre-norm block with one or several sets of LayerNorms."""

  def __init__(
    self, size: sizes.Size, eps: float, sets: tuple[str, ...] = ("",)
  ):
    super().__init__()
    for ending in sets:
      for name in ("norm1", "norm2"):
        setattr(self, name + ending, nn.LayerNorm(size.width, eps))
    self.attention = Attention(size.width, size.heads)
    self.mlp = MLP(size.width, size.mlp)

  def forward(
    self,
    x: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b 1 1 n"] | None = None,
    ending: str = "",
  ) -> Float[Tensor, "b n d"]:
    """With the LayerNorms whose names have this ending."""
    x = x + self.attention(getattr(self, "norm1" + ending)(x), mask)
    return x + self.mlp(getattr(self, "norm2" + ending)(x))


class Stack(nn.Module):
  """Blocks and, where `last` is not 0, a LayerNorm of that epsilon."""

  def __init__(
    self, depth: int, size: sizes.Size, eps: float, last: float = 0.0
  ):
    super().__init__()
    for i in range(depth):
      setattr(self, f"block_{i:02d}", Block(size, eps))
    self.depth = depth
    self.norm = nn.LayerNorm(size.width, last) if last else nn.Identity()

  def forward(
    self,
    x: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b 1 1 n"] | None = None,
  ) -> Float[Tensor, "b n d"]:
    """Applies all."""
    for i in range(self.depth):
      x = getattr(self, f"block_{i:02d}")(x, mask)
    return self.norm(x)


class Joint(nn.Module):
  """CAV-MAE's joint block and last LayerNorm, with three sets of LayerNorms."""

  sets = ("", "_audio", "_video")

  def __init__(self, size: sizes.Size):
    super().__init__()
    self.block_00 = Block(size, EPS, self.sets)
    for ending in self.sets:
      setattr(self, "norm" + ending, nn.LayerNorm(size.width, EPS))

  def forward(
    self, x: Float[Tensor, "b n d"], ending: str
  ) -> Float[Tensor, "b n d"]:
    """With one of the sets."""
    return getattr(self, "norm" + ending)(self.block_00(x, ending=ending))


class Autoencoder(nn.Module):
  """Embeddings, positions, decoder and heads.

  Attributes:
    model: `config.model`.
    grids: patches of the modalities.
    fixed: position tables do not train.
  """

  fixed = False

  def __init__(self, model: Any, grids: Grids, table: Any, eps: float):
    super().__init__()
    self.model, self.grids = model, dict(grids)
    self.group = model.get("group_size", 0)  # torch.compile stops at `get`
    self.size = size = sizes.resolve(model)
    self.decoder_size = small = sizes.resolve(model, "decoder_", table)
    audio, video = math.prod(model.patch_audio), math.prod(model.patch_video)
    self.pixels = {"audio": audio, "video": 3 * video}
    for m, pixels in self.pixels.items():
      setattr(self, f"embed_{m}", nn.Linear(pixels, size.width))
      setattr(self, f"head_{m}", nn.Linear(small.width, pixels))
      self.add_table(f"positions_{m}", m, size.width)
      self.add_table(f"decoder_positions_{m}", m, small.width)
      self.add_token(f"decoder_modality_token_{m}", small.width)
    self.add_token("mask_token", small.width)
    self.decoder_project = nn.Linear(size.width, small.width)
    self.decoder = Stack(small.depth, small, eps, eps)

  def add_table(self, name: str, m: str, d: int) -> None:
    """A 2-D sine table."""
    table = torch.from_numpy(positions.sincos_2d(self.grids[m], d))
    if self.fixed:
      self.register_buffer(name, table)
    else:
      self.register_parameter(name, nn.Parameter(table))

  def add_token(self, name: str, d: int) -> None:
    """A vector that is added, or stands for what was masked."""
    self.register_parameter(name, nn.Parameter(0.02 * torch.randn(d)))

  def patches(self, inputs: Inputs) -> dict[str, Float[Tensor, "b _ _"]]:
    """Raw patches: pixels as (mel, time) and (row, column, channel)."""
    frames, (h, w) = inputs["frames"].squeeze(1), self.grids["video"]
    sound, (f, t) = inputs["fbank"].transpose(1, 2), self.grids["audio"]
    _, ph, pw = self.model.patch_video
    pf, pt = self.model.patch_audio
    frames = frames[:, : h * ph, : w * pw].unflatten(1, (h, ph))
    frames = frames.unflatten(3, (w, pw)).transpose(2, 3)
    sound = sound[:, : f * pf, : t * pt].unflatten(1, (f, pf))
    sound = sound.unflatten(3, (t, pt)).transpose(2, 3)
    found = {"audio": sound, "video": frames}
    return {m: x.reshape(len(x), -1, self.pixels[m]) for m, x in found.items()}

  def order(self, m: str, inputs: Inputs) -> Int[Tensor, "b n"]:
    """Tokens in ascending order of noise; `noise/<m>` is taken as it is."""
    x, n = inputs["fbank"], math.prod(self.grids[m])
    noise = inputs.get(f"noise/{m}")
    if noise is None:
      noise = torch.rand(len(x), n, device=x.device)
    return noise.argsort(1)

  def embed(
    self, m: str, patches: Float[Tensor, "b n p"], ids: Int[Tensor, "b k"]
  ) -> Float[Tensor, "b k d"]:
    """The kept patches as tokens with positions."""
    x = getattr(self, f"embed_{m}")(take(patches, ids))
    return x + getattr(self, f"positions_{m}")[ids]

  def restore(
    self, m: str, x: Float[Tensor, "b k d"], ids: Int[Tensor, "b k"]
  ) -> Float[Tensor, "b n d"]:
    """Tokens in their places, mask tokens in the others, with positions."""
    table = getattr(self, f"decoder_positions_{m}")
    blank = self.mask_token.to(x.dtype).expand(len(x), *table.shape)
    whole = blank.scatter(1, expand(ids, x.shape[2]), x)
    return whole + table + getattr(self, f"decoder_modality_token_{m}")

  def reconstruct(
    self,
    x: Float[Tensor, "b n d"],
    patches: Mapping[str, Float[Tensor, "b _ _"]],
    removed: Mapping[str, Bool[Tensor, "b _"]],
  ) -> Float[Tensor, ""]:
    """Sum of the modalities' errors over the patches that were removed."""
    count = [target.shape[1] for target in patches.values()]
    total = 0.0
    for (m, target), part in zip(
      patches.items(), self.decoder(x).split(count, 1), strict=True
    ):
      if self.model.norm_pix:
        mean, var = target.mean(2, True), target.var(2, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
      error = getattr(self, f"head_{m}")(part).float() - target
      error = error.square().mean(2) * removed[m]
      total = total + error.sum() / removed[m].sum()
    return total

  def contrast(
    self, anchors: Float[Tensor, "b d"], candidates: Float[Tensor, "b d"]
  ) -> Float[Tensor, ""]:
    """InfoNCE of each anchor among its group's candidates."""
    size = self.group or len(anchors)
    rows, columns = (
      F.normalize(x.float(), dim=1).unflatten(0, (-1, size))
      for x in (anchors, candidates)
    )
    logits = rows @ columns.transpose(1, 2) / self.model.temperature
    own = torch.arange(size, device=logits.device).expand(len(logits), size)
    return F.cross_entropy(logits.flatten(0, 1), own.flatten())


def expand(ids: Int[Tensor, "b k"], d: int) -> Int[Tensor, "b k d"]:
  """Indices of whole rows, for gather and scatter."""
  return ids[:, :, None].expand(-1, -1, d)


def take(
  x: Float[Tensor, "b n d"], ids: Int[Tensor, "b k"]
) -> Float[Tensor, "b k d"]:
  """x[b, ids[b, k]]."""
  return x.gather(1, expand(ids, x.shape[2]))


def removed(ids: Int[Tensor, "b k"], n: int) -> Bool[Tensor, "b n"]:
  """True where a token was masked out."""
  whole = torch.ones(len(ids), n, dtype=torch.bool, device=ids.device)
  return whole.scatter(1, ids, False)


class CAVMAE(Autoencoder):
  """See `avjax.methods.cavmae.CAVMAE`."""

  fixed = True

  def __init__(self, model: Any, grids: Grids):
    super().__init__(model, grids, cavmae_config.DECODER_SIZES, EPS)
    for m in MODALITIES:
      self.add_token(f"modality_token_{m}", self.size.width)
      stack = Stack(self.size.depth - 1, self.size, EPS)
      setattr(self, f"encoder_{m}", stack)
    self.encoder_joint = Joint(self.size)

  def forward(self, inputs: Inputs) -> Float[Tensor, ""]:
    """The loss of a batch."""
    model, patches, ids, alone = self.model, self.patches(inputs), {}, {}
    for m, x in patches.items():
      kept = num_kept(m, x.shape[1], model[f"mask_{m}"], f"model.mask_{m}=")
      ids[m] = self.order(m, inputs)[:, :kept]
      token = getattr(self, f"modality_token_{m}")
      x = self.embed(m, x, ids[m]) + token
      alone[m] = getattr(self, f"encoder_{m}")(x)
    together = self.encoder_joint(torch.cat([*alone.values()], 1), "")
    pooled = {m: self.encoder_joint(x, f"_{m}") for m, x in alone.items()}
    pooled = {m: x.float().mean(1) for m, x in pooled.items()}
    lengths = [x.shape[1] for x in ids.values()]
    parts = self.decoder_project(together).split(lengths, 1)
    whole = [
      self.restore(m, x, ids[m]) for m, x in zip(ids, parts, strict=True)
    ]
    masks = {m: removed(ids[m], x.shape[1]) for m, x in patches.items()}
    loss = self.reconstruct(torch.cat(whole, 1), patches, masks)
    contrast = self.contrast(pooled["video"], pooled["audio"])
    return model.mae_weight * loss + model.contrast_weight * contrast


class AVSiam(Autoencoder):
  """See `avjax.methods.avsiam.AVSiam`; a loop over the groups of a ratio."""

  def __init__(self, model: Any, grids: Grids):
    super().__init__(model, grids, avsiam_config.DECODER_SIZES, model.eps)
    size = self.size
    self.encoder = Stack(size.depth, size, model.eps, LAST_EPS)
    self.multimodal = Stack(model.multimodal_depth, size, model.eps)

  def groups(self, m: str, inputs: Inputs) -> list[Int[Tensor, "g"]]:
    """The examples of every ratio: one of each block of neighbours."""
    x, ratios = inputs["fbank"], len(self.model.ratios)
    shares = inputs.get(f"noise_ratio/{m}")
    if shares is None:
      shares = torch.rand(len(x), device=x.device)
    example = shares.view(-1, ratios).argsort(1)
    starts = torch.arange(0, len(x), ratios, device=x.device)
    return list((example + starts[:, None]).unbind(1))

  def kept(self, m: str) -> list[int]:
    """Tokens that stay, by group."""
    n = math.prod(self.grids[m])
    return [num_kept(m, n, r, "model.ratios with ") for r in self.model.ratios]

  def encode(
    self, m: str, patches: Float[Tensor, "b n p"], inputs: Inputs
  ) -> tuple[list[Any], Float[Tensor, "b d"]]:
    """(examples, ids, tokens) of every group, and the means of the tokens."""
    order, found = self.order(m, inputs), []
    for rows, kept in zip(self.groups(m, inputs), self.kept(m), strict=True):
      ids = order[rows, :kept]
      tokens = self.encoder(self.embed(m, patches[rows], ids))
      found.append((rows, ids, tokens))
    means = torch.cat([x.float().mean(1) for _, _, x in found])
    return found, means[inverse([rows for rows, _, _ in found])]

  def together(
    self, audio: list[Any], video: list[Any]
  ) -> tuple[Float[Tensor, "b n d"], dict[str, Bool[Tensor, "b _"]]]:
    """The multimodal layers; the decoder's tokens, and what was removed.

    Video is padded to its longest group; padding is no key.
    """
    longest = max(self.kept("video"))
    back = inverse([rows for rows, _, _ in video])
    pad = [(0, longest - x.shape[1]) for _, _, x in video]
    x = [F.pad(x, (0, 0, *p)) for p, (_, _, x) in zip(pad, video, strict=True)]
    ids = [F.pad(i, p) for p, (_, i, _) in zip(pad, video, strict=True)]
    count = [torch.full_like(rows, i.shape[1]) for rows, i, _ in video]
    x, ids, count = (torch.cat(part)[back] for part in (x, ids, count))
    whole, masks = [], {"audio": [], "video": []}
    for rows, places, sound in audio:
      y, n = torch.cat([sound, x[rows]], 1), sound.shape[1]
      last = n + count[rows]
      seen = torch.arange(n + longest, device=y.device) < last[:, None]
      y = self.decoder_project(self.multimodal(y, seen[:, None, None]))
      both = [self.restore("audio", y[:, :n], places)]
      both += [self.restore_some(y[:, n:], ids[rows], seen[:, n:])]
      whole.append(torch.cat(both, 1))
      masks["audio"].append(removed(places, math.prod(self.grids["audio"])))
      masks["video"].append(self.some_removed(ids[rows], seen[:, n:]))
    back = inverse([rows for rows, _, _ in audio])
    masks = {m: torch.cat(parts)[back] for m, parts in masks.items()}
    return torch.cat(whole)[back], masks

  def restore_some(
    self,
    x: Float[Tensor, "g k d"],
    ids: Int[Tensor, "g k"],
    known: Bool[Tensor, "g k"],
  ) -> Float[Tensor, "g n d"]:
    """`restore` of padded video; padding goes to a row that is cut off."""
    n = math.prod(self.grids["video"])
    table = self.decoder_positions_video
    blank = self.mask_token.to(x.dtype).expand(len(x), n + 1, -1)
    ids = torch.where(known, ids, n)
    whole = blank.scatter(1, expand(ids, x.shape[2]), x)[:, :n]
    return whole + table + self.decoder_modality_token_video

  def some_removed(
    self, ids: Int[Tensor, "g k"], known: Bool[Tensor, "g k"]
  ) -> Bool[Tensor, "g n"]:
    """`removed` of padded video."""
    n = math.prod(self.grids["video"])
    return removed(torch.where(known, ids, n), n + 1)[:, :n]

  def forward(self, inputs: Inputs) -> Float[Tensor, ""]:
    """The loss of a batch."""
    patches, groups, pooled = self.patches(inputs), {}, {}
    for m, x in patches.items():
      groups[m], pooled[m] = self.encode(m, x, inputs)
    # No gradient from here to the encoder (stop_gradient).
    groups = {
      m: [(rows, ids, x.detach()) for rows, ids, x in parts]
      for m, parts in groups.items()
    }
    x, masks = self.together(groups["audio"], groups["video"])
    loss = self.reconstruct(x, patches, masks)
    contrast = self.contrast(pooled["audio"], pooled["video"])
    return self.model.mae_weight * loss + self.model.contrast_weight * contrast


def inverse(groups: list[Int[Tensor, "_"]]) -> Int[Tensor, "b"]:
  """Puts rows of groups one after the other back into the batch's order."""
  return torch.cat(groups).argsort()


SYSTEMS = {"cavmae": CAVMAE, "avsiam": AVSiam}


def load(module: nn.Module, params: Any) -> None:
  """Copies parameters of avjax into the module that does the same.

  Raises:
    RuntimeError: a name or a shape differs (PyTorch's).
  """
  state = {}
  for path, value in trees.flatten(params).items():
    name, value = path.replace("/", "."), np.array(value)
    if name.endswith(".kernel"):
      value = value.T.copy()
    name = name.replace(".kernel", ".weight").replace(".scale", ".weight")
    state[name] = torch.from_numpy(value)
  module.load_state_dict(state)


def trained(module: nn.Module) -> int:
  """Numbers that an optimiser moves."""
  return sum(p.numel() for p in module.parameters() if p.requires_grad)


def step(
  module: nn.Module, section: Any, rate: float, device: str = "cpu"
) -> Callable[[Inputs], Tensor]:
  """A training step: loss, gradients, Adam.

  Args:
    module: its call gives the loss.
    section: `config.optimizer`, whose decay is coupled.
    rate: the learning rate.
    device: 'cuda' also compiles, and computes in bfloat16 where it is safe.
  """
  module = module.to(device)
  adam = torch.optim.Adam(
    module.parameters(),
    rate,
    (section.b1, section.b2),
    section.eps,
    section.weight_decay,
    fused=True,
  )
  call, half = module, device != "cpu"
  if half:
    call = torch.compile(module)

  def run(inputs):
    with torch.autocast(device, torch.bfloat16, enabled=half):
      loss = call(inputs)
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()
    return loss.detach()

  return run


def stack_step(
  module: Stack, x: Float[Tensor, "b n d"], device: str = "cpu"
) -> Callable[[], Tensor]:
  """Forward and backward of a stack to its parameters and its input.

  Args:
    module: the blocks.
    x: tokens; the loss is the mean square of what they become.
    device: as of `step`.
  """
  module = module.to(device)
  x = x.to(device).requires_grad_()
  call, half = module, device != "cpu"
  if half:
    call = torch.compile(module)

  def run():
    with torch.autocast(device, torch.bfloat16, enabled=half):
      loss = call(x).float().square().mean()
    module.zero_grad(set_to_none=True)
    x.grad = None
    loss.backward()
    return loss.detach()

  return run
