"""A tiny method of sounds, pictures and texts, and batches for it."""

import jax.numpy as jnp
import numpy as np

from avjax import losses
from avjax.config import base_config, eval_section
from avjax.data import augment, text
from avjax.evaluators.base import Context
from avjax.methods.base import Method
from avjax.workdir import workdir

LENGTH = 8


class Tables(Method):
  """Clips are rows of tables, by their number, texts weighted sums of words."""

  retrieval_modes = ("a", "v", "av")

  def encode_media(self, params, inputs, mode):
    number = inputs["index"].astype(int)
    found = {"feature": params[mode][number]}
    if "tokens" in params:
      found["tokens"] = params["tokens"][number]
    return found

  def encode_text(self, params, ids, mask):
    return losses.unit(self.said(params, ids, mask))

  def said(self, params, ids, mask):
    weight = mask * (1 + jnp.arange(ids.shape[1]))
    return (params["words"][ids] * weight[..., None]).sum(axis=1)

  def match(self, params, tokens, ids, mask):
    said = self.said(params, ids, mask) / 9
    return 3 * jnp.tanh((tokens.mean(axis=1) * said).sum(axis=-1))

  def caption_start(self, params, tokens, length):
    return tokens.mean(axis=1), jnp.zeros((len(tokens), 4))

  def caption_step(self, params, seen, read, token, position):
    read = 0.5 * read + params["words"][token]
    hidden = jnp.tanh(read + seen + position / 4)
    return 2 * hidden @ params["words"].T, read


def config(**data):
  made = base_config()
  made.data.update(heads=(), **data)
  made.data.text.update(vocabulary="av_demo", length=LENGTH)
  return made


def params(rng, clips, *, queries=3, tokens=True):
  """Of `Tables`; the vocabulary is av_demo's."""
  size = text.tokenizer(config().data).size

  def draw(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  made = {m: draw(clips, queries, 4) for m in Tables.retrieval_modes}
  made = {m: np.array(losses.unit(jnp.asarray(x))) for m, x in made.items()}
  made["words"] = draw(size, 4)
  return {**made, **({"tokens": draw(clips, 5, 4)} if tokens else {})}


def context(made, batches, folder, pictures=None, method=Tables):
  pictures = [] if pictures is None else pictures
  return Context(
    config=made,
    method=method(made),
    prepare=lambda b, rng, train: augment.prepare(b, made.data, rng, train),
    batches=lambda section: iter(batches),
    workdir=workdir(folder),
    picture=lambda name, image, step: pictures.append((name, image)),
  )


def batches(captions, *, size, most=3, **has):
  """Batches of clips with these captions, the last one padded.

  `has_audio` and `has_video` are lists, by clip; all have both otherwise.
  """
  tokenizer = text.tokenizer(config().data)
  count = len(captions)
  for first in range(0, count, size):
    ids = np.zeros((size, most, LENGTH), np.int32)
    mask = np.zeros(ids.shape, bool)
    valid = first + np.arange(size) < count
    for row in np.flatnonzero(valid):
      texts = captions[first + row]
      ids[row, : len(texts)], mask[row, : len(texts)] = tokenizer.encode(
        texts, LENGTH
      )
    batch = {
      "index": (first + np.arange(size)).astype(np.uint32),
      "valid": valid,
      "text": ids,
      "text_mask": mask,
    }
    for key in ("has_audio", "has_video"):
      row = np.array([*has.get(key, [True] * count), *[True] * size])
      batch[key] = row[first : first + size]
    yield batch, []


def section(kind, **options):
  return eval_section(kind, **{"captions": 3, **options})
