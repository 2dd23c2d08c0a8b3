"""CoAVT's configs: arguments, published values, sizes and rates."""

import jax
import pytest

from avjax import methods, optim
from avjax.errors import InputError
from tests.runs import assert_fits, inputs, load, params, value

ARGUMENTS = {
  "coavt_audioset": (
    "mask_audio=0,mask_video=0", "pretrain=cavmae", "demo,epochs=3",
    "demo,variant=vanilla,queries=8", "demo,variant=baseline",
    "demo,variant=without_v",
  ),
  "coavt_audiocaps_finetune": (
    "modality=a", "demo,pretrain=audioset", "demo,variant=baseline",
    "demo,epochs=0",
  ),
  "coavt_clotho_finetune": ("pretrain=audiocaps", "demo,epochs=3"),
  "coavt_vgg_finetune": ("modality=a", "demo,variant=vanilla"),
  "coavt_as20k_finetune": ("demo,modality=v",),
}  # fmt: skip


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "name, arg", [(n, a) for n, args in ARGUMENTS.items() for a in args]
)
def test_arguments_resolve_and_fit_the_method(name, arg):
  assert_fits(load(name, arg))


# --- Numbers of the paper ----------------------------------------------------

COMMON = {
  "optimizer.name": "adam",
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.98,
  "optimizer.weight_decay": 0.05,
  "schedule.name": "cosine",
  "schedule.end_lr": 1e-6,
  "model.size": "B",
  "model.queries": 16,
  "model.cross_every": 1,
  "model.query_ffn": False,
  "data.variant": "frames10",
  "data.video.num_frames": 1,
  "data.video.size": 224,
  "data.fbank.window": "hanning",
  "data.fbank.num_mels": 128,
  "data.fbank.frames": 1_024,
}
KEYS = (
  "batch_size", "total_epochs", "schedule.base_lr", "schedule.warmup_steps",
  "schedule.warmup_epochs",
)  # fmt: skip
TABLE = {
  "coavt_audioset": (512, 5.0, 1e-4, 2_000, 0.0),
  "coavt_audiocaps_finetune": (128, 15.0, 3e-5, 0, 1.0),
  "coavt_clotho_finetune": (128, 15.0, 3e-5, 0, 1.0),
  "coavt_vgg_finetune": (64, 15.0, 8e-5, 0, 1.0),
  "coavt_as20k_finetune": (64, 15.0, 8e-5, 0, 1.0),
}


@pytest.mark.parametrize("name", TABLE)
def test_recipes_are_the_papers(name):
  config = load(name)
  assert {key: value(config, key) for key in COMMON} == COMMON
  assert tuple(value(config, key) for key in KEYS) == TABLE[name]


def test_masks_and_texts():
  config = load("coavt_audioset")
  masks = (config.model.mask_audio, config.model.mask_video)
  assert masks == (0.75, 0.5) and config.data.text.source == "labels"
  for name in ("audiocaps", "clotho"):
    config = load(f"coavt_{name}_finetune")
    masks = (config.model.mask_audio, config.model.mask_video)
    assert masks == (0.0, 0.0) and config.data.text.source == "captions"
    assert (config.evals.text.captions, config.evals.text.rerank) == (5, 128)


@pytest.mark.parametrize(
  "variant, modes, objectives",
  [
    ("coavt", ("av", "a", "v"), ("contrast", "matching", "language")),
    ("without_v", ("av", "a"), ("contrast", "matching", "language")),
    ("vanilla", ("av",), ("contrast", "matching", "language")),
    ("baseline", ("av",), ("contrast",)),
  ],
)
def test_variants(variant, modes, objectives):
  for name in ("coavt_audioset", "coavt_audiocaps_finetune"):
    config = load(name, f"variant={variant}")
    assert config.model.modes == modes
    assert config.model.objectives == objectives
    assert config.model.query_encoder == (variant != "baseline")
  told = "" if variant == "coavt" else f"-variant_{variant}"
  assert config.init_from == f"runs/coavt_audioset{told}"
  assert ("captions" in config.evals) == (variant != "baseline")


def test_sound_alone_has_one_pair():
  config = load("coavt_clotho_finetune")
  assert config.model.modes == ("a",) and config.data.modality == "a"
  assert "retrieval" not in config.evals
  assert "frames" not in inputs(config)


@pytest.mark.parametrize(
  "name", ["coavt_audiocaps_finetune", "coavt_clotho_finetune"]
)
def test_zero_shot_is_a_step_at_rate_0(name):
  config = load(name, "epochs=0")
  rate = optim.schedule(
    config.schedule, batch_size=128, steps_per_epoch=255, total_steps=1
  )
  assert config.total_steps == 1 and rate(0) == 0
  assert config.total_epochs == 0


def test_rate_of_pretraining():
  """14,165 steps: up for 2,000, then down to 1e-6."""
  config = load("coavt_audioset")
  rate = optim.schedule(
    config.schedule, batch_size=512, steps_per_epoch=2_833, total_steps=14_165
  )
  for step, expected in ((0, 0), (1_000, 5e-5), (2_000, 1e-4)):
    assert float(rate(step)) == pytest.approx(expected)
  assert float(rate(8_082)) == pytest.approx(5.05e-5, rel=1e-3)
  assert float(rate(14_165)) == pytest.approx(1e-6)


# --- Sizes -------------------------------------------------------------------

# BERT-base without token types, 16 queries, cross-attention in 12 blocks, the
# head for words, projections to 256, the head for matches, the temperature.
QUERY_ENCODER = 138_287_934
ENCODER = 164_365_056


def test_parameters_at_full_size():
  found = params(load("coavt_audioset"))
  assert count(found["query_encoder"]) == QUERY_ENCODER
  assert count(found) == QUERY_ENCODER + ENCODER
  words = found["query_encoder"]["words"]["embedding"]
  assert words.shape == (30_523, 768)
  fewer = params(load("coavt_audioset", "queries=8"))
  assert count(found) - count(fewer) == 8 * 768


def test_what_classification_leaves_out():
  found = params(load("coavt_vgg_finetune"))
  assert set(found["query_encoder"]) == {
    "norm", "positions", "queries", "temperature",
    *(f"block_{i:02d}" for i in range(12)),
  }  # fmt: skip
  assert found["classifier"]["kernel"].shape == (768, 309)


@pytest.mark.parametrize(
  "name, arg, words",
  [
    ("coavt_audioset", "variant=base", "Did you mean 'baseline'"),
    ("coavt_audioset", "pretrain=bert", "pretrain"),
    ("coavt_audiocaps_finetune", "modality=x", "modality|modes"),
    ("coavt_vgg_finetune", "variant=baseline", "variant"),
  ],
)
def test_unknown_values_are_refused(name, arg, words):
  with pytest.raises(InputError, match=words):
    methods.make(load(name, arg))
