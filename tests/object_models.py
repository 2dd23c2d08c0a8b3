"""Tiny CLAP and YOLO files with random weights, and an msclap that is none."""

import json

import numpy as np

from data_prep import object_audio, object_video

NAMES = ["Dog", "Cat", "Bell", "Accordion", "Train"]
RATE = 16_000

# YOLOv8's layers, a hundredth as wide, with two outputs instead of three.
LAYERS = {
  "nc": len(NAMES),
  "depth_multiple": 0.33,
  "width_multiple": 0.0625,
  "max_channels": 64,
  "backbone": [
    [-1, 1, "Conv", [64, 3, 2]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 1, "C2f", [128, True]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 1, "SPPF", [256, 5]],
  ],
  "head": [
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 4], 1, "Concat", [1]],
    [-1, 1, "C2f", [256]],
    [[3, 9, 6], 1, "Detect", ["nc"]],
  ],
}


def write_clap(folder):
  """CLAP for transformers, windows of 1 s at 16 kHz."""
  with object_audio.whole_torchvision():
    import torch
    import transformers

    torch.manual_seed(0)
    text = {
      "vocab_size": 120, "hidden_size": 16, "num_hidden_layers": 1,
      "num_attention_heads": 2, "intermediate_size": 16, "projection_dim": 16,
      "max_position_embeddings": 80,
    }  # fmt: skip
    sound = {
      "spec_size": 64, "num_mel_bins": 16, "patch_embeds_hidden_size": 8,
      "hidden_size": 32, "depths": [1, 1, 1], "num_hidden_layers": 3,
      "num_attention_heads": [1, 2, 2], "window_size": 4, "patch_size": 4,
      "patch_stride": [4, 4], "projection_dim": 16, "num_classes": 4,
    }  # fmt: skip
    config = transformers.ClapConfig(
      text_config=text, audio_config=sound, projection_dim=16
    )
    model = transformers.ClapModel(config)
    with torch.no_grad():  # as drawn, all texts and sounds are nearly alike
      for name, weights in model.named_parameters():
        if weights.ndim > 1:
          weights.mul_(2 if name.startswith("text") else 3)
    model.save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(
      feature_size=16, sampling_rate=RATE, hop_length=160, max_length_s=1,
      fft_window_size=400, truncation="rand_trunc", frequency_max=8000,
    )  # fmt: skip
    extractor.save_pretrained(folder)
  letters = [chr(code) for code in range(33, 127)]
  words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġ"]
  vocabulary = {word: number for number, word in enumerate(words)}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  (folder / "merges.txt").write_text("#version: 0.2\n")
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "RobertaTokenizer"})
  )


def write_yolo(path, names=tuple(NAMES), **more):
  """A detector as Ultralytics saves it; `more` goes into the checkpoint."""
  torch, _ = object_video._ultralytics()
  from ultralytics.nn import tasks

  torch.manual_seed(0)
  layers = LAYERS | {"nc": len(names)}
  model = tasks.DetectionModel(layers, ch=3, nc=len(names), verbose=False)
  model.names, model.args = dict(enumerate(names)), {}
  norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  for norm in norms:
    norm.momentum = None  # averages
  with torch.no_grad():
    model.train()(torch.rand(4, 3, 64, 64))
  for branch in model.eval().model[-1].cv3:  # not all scores alike
    torch.nn.init.normal_(branch[-1].weight, std=0.02)
    torch.nn.init.constant_(branch[-1].bias, -1.0)
  kept = {"epoch": -1, "model": model.half(), "ema": None, "train_args": {}}
  torch.save(kept | more, path)


class Ears:
  """What msclap_worker.py makes of msclap, with sums instead of a model."""

  rate, size, version = 8_000, 4_000, "msclap 0.0"

  def text(self, texts):
    return np.array([[len(t), t.count("a"), 1] for t in texts], np.float32)

  def sound(self, windows):
    assert windows.shape[1] == self.size and windows.dtype == np.float32
    return np.stack([windows.mean(1), windows.std(1), windows[:, -1]], 1)
