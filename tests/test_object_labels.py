"""Object scores of CLAP and YOLO, against their own libraries; resuming."""

import functools
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import cv2
import librosa
import numpy as np
import pytest
import simplejpeg

from avjax.data import media
from avjax.data.object_scores import Scores
from avjax.errors import InputError
from data_prep import (
  msclap_worker,
  object_audio,
  object_clips,
  object_labels,
  object_msclap,
  object_video,
)
from tests import object_models
from tests.object_models import NAMES
from tests.test_media import write_file

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A folder with clap/, yolo.pt and labels.txt, in another order."""
  place = tmp_path_factory.mktemp("models")
  (place / "clap").mkdir()
  object_models.write_clap(place / "clap")
  object_models.write_yolo(place / "yolo.pt")
  (place / "labels.txt").write_text("Bell\nDog\n\nTrain\nCat\n")
  return place


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Media files: both tracks, no sound, no pictures, broken."""
  place = tmp_path_factory.mktemp("media")
  (place / "in").mkdir()
  write_file(place / "-a.mp4", size=(48, 96), seconds=1.5)
  write_file(place / "in" / "silent.mp4", audio=False, seconds=0.5)
  write_file(place / "blind.mp4", video=False, seconds=0.5)
  (place / "broken.mp4").write_bytes(b"no media")
  return place


@pytest.fixture
def arguments(models, files, tmp_path):
  """The command's flags for the media files."""

  def make(**change):
    values = {
      "output": str(tmp_path / "scores"), "dataset": None, "split": None,
      "data_dir": "", "variant": "frames10", "media": str(files),
      "labels": str(models / "labels.txt"),
      "audio_model": str(models / "clap"),
      "video_model": str(models / "yolo.pt"), "msclap_python": "",
      "msclap_weights": "", "msclap_gpt2": "", "audio_batch": 3,
      "video_batch": 12, "device": "cpu", "threads": 2, "limit": 0,
      "retry": False,
    }  # fmt: skip
    return types.SimpleNamespace(**values | change)

  return make


LABELS = ["Bell", "Dog", "Train", "Cat"]


# ------------------------------------------------------------------ audio


@functools.cache
def reference_clap(folder):
  """(model, processor) by transformers alone."""
  with object_audio.whole_torchvision():
    import transformers

    model = transformers.ClapModel.from_pretrained(folder).eval()
    return model, transformers.ClapProcessor.from_pretrained(folder)


def cosines(folder, windows, labels=LABELS):
  """Cosines of windows at 16 kHz with the labels, by CLAP's own forward."""
  import torch

  model, processor = reference_clap(folder)
  tokens = processor.tokenizer(
    [f"this is sound of {label}" for label in labels],
    padding=True,
    return_tensors="pt",
  )
  heard = processor.feature_extractor(
    list(windows), sampling_rate=object_models.RATE, return_tensors="pt"
  )
  with torch.no_grad():
    found = model(
      input_ids=tokens["input_ids"],
      attention_mask=tokens["attention_mask"],
      input_features=heard["input_features"].float(),
      is_longer=torch.zeros(len(windows), 1, dtype=torch.bool),
    )
  scale = float(model.logit_scale_a.detach().exp())
  return found.logits_per_audio.numpy() / scale


def test_cosines_are_those_of_clap_itself(models):
  rng, time = np.random.default_rng(0), np.arange(40_000)
  noise = rng.normal(size=40_000)
  sounds = [
    (3_000 * wave).astype(np.int16)
    for wave in (
      np.sin(time * 0.2) + time / 40_000 * noise,
      noise[:16_000],
      noise[:5_000] * (time[:5_000] % 1_000 < 50),
      np.sin(time[:17_000] * 0.02),
    )
  ]
  model = object_audio.Clap(models / "clap")
  scorer = object_audio.Scorer(model, LABELS, batch_size=2)
  cut = [object_audio.windows(sound, 16_000, model) for sound in sounds]
  found = scorer.scores(cut)
  waves = [sound.astype(np.float32) / 32_768 for sound in sounds]
  own = [
    [waves[0][k : k + 16_000] for k in (0, 12_000, 24_000)],
    [waves[1]],
    [waves[2]],  # repeated by the extractor
    [waves[3][:16_000]],  # a rest of 0.06 s
  ]
  for row, windows in zip(found, own, strict=True):
    expected = cosines(models / "clap", windows).mean(axis=0)
    np.testing.assert_allclose(row, expected, atol=2e-5)
  # They tell labels and sounds apart.
  assert np.ptp(found, axis=0).min() > 0.05 < np.ptp(found, axis=1).max()
  assert model.source["model"] == "clap" and model.source["rate"] == 16_000


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_short_sounds_are_filled_as_the_model_does(models, padding):
  model = object_audio.Clap(models / "clap")
  model._extractor.padding = padding
  wave = np.random.default_rng(1).normal(size=7_000).astype(np.float32)
  expected = model._extractor(wave, sampling_rate=16_000, return_tensors="np")[
    "input_features"
  ][0]
  found = model.log_mel(model.fill(wave)[None])[0].numpy()
  np.testing.assert_allclose(found, expected, atol=1e-3)  # decibels


def test_windows_cover_a_clip_evenly():
  model = types.SimpleNamespace(rate=100, size=100, fill=None)
  for length, starts in [
    (100, [0]),
    (110, [0]),  # 0.1 s is left out
    (111, [0, 11]),
    (200, [0, 100]),
    (250, [0, 75, 150]),
  ]:
    sound = np.arange(length, dtype=np.int16)
    found = object_audio.windows(sound, 100, model) * 32_768
    assert found[:, 0].tolist() == starts and found.shape[1] == 100
    assert found[-1, -1] == length - 1 or length == 110


def test_stored_sound_is_resampled_to_the_models_rate():
  model = types.SimpleNamespace(rate=44_100, size=44_100, fill=None)
  sound = (np.sin(np.arange(16_000) * 0.3) * 9_000).astype(np.int16)
  (found,) = object_audio.windows(sound, 16_000, model)
  expected = librosa.resample(
    sound / np.float32(32_768), orig_sr=16_000, target_sr=44_100
  )
  np.testing.assert_allclose(found, expected[:44_100], atol=1e-4)


def test_clap_without_all_its_weights_is_refused(models, tmp_path):
  from safetensors.numpy import load_file, save_file

  folder = tmp_path / "clap"
  shutil.copytree(models / "clap", folder)
  weights = load_file(folder / "model.safetensors")
  del weights["audio_projection.linear1.weight"]
  save_file(weights, folder / "model.safetensors", {"format": "pt"})
  with pytest.raises(InputError, match="lacks 1 weights.*audio_projection"):
    object_audio.Clap(folder)
  (folder / "model.safetensors").write_bytes(b"cut")
  with pytest.raises(InputError, match="clap: "):
    object_audio.Clap(folder)
  with pytest.raises(InputError, match="laion/clap-htsat-unfused"):
    object_audio.Clap("laion/clap-htsat-unfused")  # nothing is fetched


# --------------------------------------------------- Microsoft's, elsewhere

FAKE = """
import sys
sys.path.insert(0, {root!r})
from data_prep import msclap_worker
from tests import object_models
weights, device, *gpt2 = sys.argv[1:]
assert device == "cpu" and gpt2 == []
class Ears(object_models.Ears):
  def __init__(self):
    print("noise", flush=True)  # goes to stderr
  def sound(self, windows):
    if len(windows) == 5:
      raise ValueError("out of memory, say")
    return super().sound(windows)
msclap_worker.Clap = lambda *_: Ears()
msclap_worker.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def fake_worker(tmp_path_factory):
  """A program that speaks as msclap_worker.py does, and its weights."""
  place = tmp_path_factory.mktemp("worker")
  (place / "worker.py").write_text(FAKE.format(root=str(ROOT)))
  (place / "weights.pth").write_bytes(b"")
  return place


def test_a_worker_in_another_environment_answers(fake_worker):
  ears = object_models.Ears()
  model = object_msclap.Msclap(
    sys.executable,
    str(fake_worker / "weights.pth"),
    worker=fake_worker / "worker.py",
  )
  try:
    assert (model.rate, model.size) == (8_000, 4_000)
    assert model.source["library"] == "msclap 0.0"
    texts = ["this is sound of Dog", "this is sound of\n a  Cat, 'é'"]
    np.testing.assert_array_equal(
      model.text(texts), ears.text([texts[0], "this is sound of a Cat, 'é'"])
    )
    rng = np.random.default_rng(0)
    wave = rng.normal(size=(40, 4_000)).astype(np.float32)
    np.testing.assert_array_equal(model.sound(wave), ears.sound(wave))
    assert model.fill(wave[0, :1_500]).tolist() == (
      np.tile(wave[0, :1_500], 3)[:4_000].tolist()
    )
    with pytest.raises(InputError, match="status 1: ValueError: out of memo"):
      model.sound(wave[:5])
  finally:
    model.close()


def test_a_worker_that_does_not_start_says_why(fake_worker, tmp_path):
  weights = str(fake_worker / "weights.pth")
  # The real worker, in an environment without msclap.
  with pytest.raises(InputError, match="1: ModuleNotFoundError: .*msclap"):
    object_msclap.Msclap(sys.executable, weights)
  with pytest.raises(InputError, match="--msclap_python=.*none"):
    object_msclap.Msclap(str(tmp_path / "none"), weights)
  with pytest.raises(InputError, match="--msclap_weights=.*is not a file"):
    object_msclap.Msclap(sys.executable, str(tmp_path / "none"))
  with pytest.raises(InputError, match="requirements-msclap.txt"):
    object_msclap.Msclap("", weights)


def test_the_workers_loop_answers_arrays_until_the_end():
  sent, answers = io.BytesIO(), io.BytesIO()
  texts = np.frombuffer(b"one\ntwo a", np.uint8)
  msclap_worker.send(sent, texts)
  msclap_worker.send(sent, np.ones((2, 4_000), np.float32))
  sent.seek(0)
  msclap_worker.serve(object_models.Ears(), sent, answers)
  answers.seek(0)
  read = [msclap_worker.receive(answers) for _ in range(5)]
  assert read[0].tolist() == [8_000, 4_000] and read[4] is None
  assert read[1].tobytes() == b"msclap 0.0"
  assert read[2].tolist() == [[3, 0, 1], [5, 1, 1]]
  assert read[3].tolist() == [[1, 0, 1]] * 2


# ------------------------------------------------------------------ video


def pictures(seed, count=3, size=(96, 128)):
  """Coloured squares."""
  squares = np.random.default_rng(seed).integers(0, 256, (count, 6, 8, 3))
  return [
    cv2.resize(p.astype(np.uint8), size[::-1], interpolation=0) for p in squares
  ]


def test_scores_are_the_highest_that_predict_reports(models, monkeypatch):
  monkeypatch.setattr(object_video, "SIZE", 320)
  clips = [pictures(0, 2), pictures(1, 3), pictures(2, 1, (150, 70))]
  detector = object_video.Detector(models / "yolo.pt", LABELS, batch_size=3)
  found = detector.scores([detector.prepare(clip) for clip in clips])
  assert detector.source["model"] == "yolo.pt"
  from ultralytics import YOLO
  from ultralytics.nn import autobackend

  # It would import torchvision; without it Ultralytics suppresses by its own.
  monkeypatch.setattr(autobackend.AutoBackend, "warmup", lambda *_, **__: None)
  model = YOLO(models / "yolo.pt")
  for row, clip in zip(found, clips, strict=True):
    seen = model.predict(
      [frame[..., ::-1] for frame in clip],  # it takes BGR
      conf=1e-6, max_det=30_000, imgsz=320, device="cpu", verbose=False,
    )  # fmt: skip
    best = dict.fromkeys(NAMES, 0.0)
    for result in seen:
      for k, p in zip(result.boxes.cls, result.boxes.conf, strict=True):
        best[NAMES[int(k)]] = max(best[NAMES[int(k)]], float(p))
    expected = [best[label] for label in LABELS]
    np.testing.assert_allclose(row, expected, atol=1e-5)
  assert np.ptp(found, axis=0).max() > 0.3 < np.ptp(found, axis=1).min()


def test_a_file_that_names_other_classes_is_refused(models, tmp_path):
  object_video.load(models / "yolo.pt")
  marker = tmp_path / "ran"

  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(marker),)

  object_models.write_yolo(tmp_path / "a.pt", train_args=Evil())
  with pytest.raises(InputError, match="a.pt names posix.mkdir.* refused"):
    object_video.load(tmp_path / "a.pt")

  from ultralytics.nn.tasks import DetectionModel

  class Constructed:  # a layer, whose constructor evaluates its text
    def __reduce__(self):
      code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
      layers = object_models.LAYERS | {"activation": code}
      return DetectionModel, (layers,)

  object_models.write_yolo(tmp_path / "b.pt", train_args=Constructed())
  with pytest.raises(InputError, match="calls the constructor"):
    object_video.load(tmp_path / "b.pt")
  assert not marker.exists()


def test_harmless_values_of_a_checkpoint_are_read(models, tmp_path):
  from ultralytics.utils import IterableSimpleNamespace

  more = {
    "train_metrics": {"fitness": np.float64(0.5), "n": np.int64(3)},
    "train_args": IterableSimpleNamespace(data=pathlib.Path("a/b")),
    "best": {np.float32(2.0)},
  }
  object_models.write_yolo(tmp_path / "more.pt", **more)
  for path in (tmp_path / "more.pt", models / "yolo.pt"):
    model = object_video.load(path)
    assert list(model.names.values()) == NAMES
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {
      "torch", "ultralytics",
    }  # fmt: skip


def test_other_files_are_no_detectors(models, tmp_path):
  import torch

  whole = (models / "yolo.pt").read_bytes()
  (tmp_path / "cut.pt").write_bytes(whole[:-100])
  (tmp_path / "text.pt").write_text("no weights")
  torch.save({"model": torch.zeros(3)}, tmp_path / "tensor.pt")
  torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "layer.pt")
  for name, words in [
    ("cut", "is not a file of torch.save"), ("text", "not a file of torch"),
    ("tensor", "holds no detector"), ("layer", "holds no detector"),
    ("none", "yolov8x-oiv7.pt"),
  ]:  # fmt: skip
    with pytest.raises(InputError, match=words):
      object_video.Detector(tmp_path / f"{name}.pt", LABELS)


def test_a_label_that_the_detector_does_not_know_is_refused(models):
  with pytest.raises(InputError, match="knows 5.*'Dogs'.*Did you mean 'Dog'?"):
    object_video.Detector(models / "yolo.pt", ["Cat", "Dogs"])


# ---------------------------------------------------------------- command


def test_a_folder_of_media_is_scored(arguments, models, files, tmp_path):
  lines = object_labels.run(arguments())
  heard = Scores(tmp_path / "scores", "audio")
  seen = Scores(tmp_path / "scores", "video")
  ids = ["-a.mp4", "blind.mp4", "broken.mp4", "in/silent.mp4"]
  assert heard.clips == seen.clips == ids and heard.labels == LABELS
  assert heard.done().tolist() == [True, True, False, False]
  assert seen.done().tolist() == [True, False, False, True]
  assert heard.failed["in/silent.mp4"] == "no sound"
  assert seen.failed["blind.mp4"] == "no pictures"
  assert "corrupt" in seen.failed["broken.mp4"]
  text = "\n".join(lines)
  assert "video: blind.mp4: no pictures" in text
  rows = {line[:22].strip(): line[22:].split() for line in lines}
  assert rows["scored"] == ["2", "2"] and rows["failed"] == ["2", "2"]
  over = (heard.values[:2].astype(np.float32) > 0.3).sum() / 2
  assert rows["labels a clip > 0.3"][0] == f"{over:.2f}"
  # Against the libraries, from the file.
  clip = media.read_clip(files / "-a.mp4", short_side=360)
  wave = clip.waveform.astype(np.float32) / 32_768
  size, last = object_models.RATE, len(wave) - object_models.RATE
  expected = cosines(models / "clap", [wave[:size], wave[last:]])
  np.testing.assert_allclose(heard.values[0], expected.mean(0), atol=2e-3)
  detector = object_video.Detector(models / "yolo.pt", LABELS)
  frames, _ = media.spread(list(clip.frames), "frames10")
  (expected,) = detector.scores([detector.prepare(frames)])
  np.testing.assert_allclose(seen.values[0], expected, atol=2e-3)


@pytest.fixture
def counted(monkeypatch):
  """Counts the clips that the detector computes; may stop it."""
  monkeypatch.setattr(object_video, "SIZE", 96)
  count = types.SimpleNamespace(clips=0, stop_after=None)
  scores = object_video.Detector.scores

  def counting(self, clips):
    if count.stop_after is not None and count.clips >= count.stop_after:
      raise KeyboardInterrupt
    count.clips += len(clips)
    return scores(self, clips)

  monkeypatch.setattr(object_video.Detector, "scores", counting)
  return count


def test_a_run_that_was_stopped_goes_on(
  arguments, demo_data, tmp_path, counted
):
  split = {"media": None, "dataset": "av_demo", "data_dir": demo_data}
  split |= {"limit": 4, "video_batch": 10}
  first = split | {"split": ["test"], "output": str(tmp_path / "one")}
  object_labels.run(arguments(**first))
  total, counted.clips = counted.clips, 0
  counted.stop_after = 3
  again = first | {"output": str(tmp_path / "two"), "audio_batch": 1}
  with pytest.raises(KeyboardInterrupt):
    object_labels.run(arguments(**again))
  partly = Scores(tmp_path / "two", "video").done().sum()
  assert partly == counted.clips == 3 and total == 4
  counted.stop_after = None
  object_labels.run(arguments(**again))
  assert counted.clips == total  # none was computed twice
  for modality in ("audio", "video"):
    one, two = (Scores(tmp_path / k, modality) for k in ("one", "two"))
    assert one.clips == two.clips and one.done().all()
    np.testing.assert_allclose(one.values, two.values, atol=1e-3)
  # More clips; then nothing to do.
  lines = object_labels.run(arguments(**again | {"split": ["test", "train"]}))
  found = Scores(tmp_path / "two", "video")
  assert len(found.clips) == 8 and found.done().all()
  assert counted.clips == len(found.clips)
  np.testing.assert_array_equal(found.values[:total], two.values)
  assert any(line.split() == ["done", "before", "4", "4"] for line in lines)
  object_labels.run(arguments(**again))
  assert counted.clips == len(found.clips)


def test_stored_frames_and_sound_are_those_of_the_records(
  arguments, models, demo_data
):
  for variant, count in (("frames10", 10), ("video", None)):
    source = object_clips.Stored(
      "av_demo", ["test"], data_dir=demo_data, variant=variant, limit=2
    )
    assert len(source.ids) == 2
    split, number, rate = source._places[source.ids[1]]
    record = split[number]
    blobs = record.blobs("frames")
    assert count is None or len(blobs) == count
    clip = source.read(source.ids[1], "av")
    assert clip.rate == rate == 16_000 and len(clip.frames) == 10
    for k in (0, 4, 9):
      expected = simplejpeg.decode_jpeg(blobs[k * len(blobs) // 10], "RGB")
      np.testing.assert_array_equal(clip.frames[k], expected)
    expected = np.frombuffer(record.blobs("waveform")[0], np.int16)
    np.testing.assert_array_equal(clip.sound, expected)
    assert len(source.read(source.ids[1], "a").frames) == 0


def test_failed_clips_are_read_again_with_retry(arguments, files, tmp_path):
  place = tmp_path / "media"
  shutil.copytree(files, place)
  alone = {"media": str(place), "audio_model": "none"}
  object_labels.run(arguments(**alone))
  assert not (tmp_path / "scores" / "audio.npy").exists()
  shutil.copy(place / "-a.mp4", place / "broken.mp4")
  object_labels.run(arguments(**alone))
  assert "broken.mp4" in Scores(tmp_path / "scores", "video").failed
  object_labels.run(arguments(**alone, retry=True))
  found = Scores(tmp_path / "scores", "video")
  assert list(found.failed) == ["blind.mp4"]
  a, b = found.rows(["-a.mp4", "broken.mp4"])
  np.testing.assert_allclose(found.values[a], found.values[b], atol=1e-3)


def test_scores_that_are_not_finite_are_a_failure(
  arguments, files, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    object_video.Detector,
    "scores",
    lambda self, clips: np.full((len(clips), 4), np.nan, np.float32),
  )
  with pytest.raises(InputError, match="none of 1 clips has scores"):
    object_labels.run(
      arguments(media=str(files / "-a.mp4"), audio_model="none")
    )
  failed = Scores(tmp_path / "scores", "video").failed
  assert "not finite" in failed["-a.mp4"]


def test_files_of_the_same_names_elsewhere_are_refused(
  arguments, files, tmp_path
):
  """Their scores would be taken for those that are there."""
  (tmp_path / "media").mkdir()
  shutil.copy(files / "-a.mp4", tmp_path / "media")
  object_labels.run(arguments(audio_model="none"))
  other = arguments(media=str(tmp_path / "media"), audio_model="none")
  with pytest.raises(InputError, match=r"other source \(clips: '.*' there"):
    object_labels.run(other)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"audio_model": ""}, "name --audio_model"),
    ({"audio_model": "none", "video_model": "none"}, "may be none"),
    ({"media": None}, "give --media, or --dataset"),
    ({"dataset": "av_demo"}, "give --media, or --dataset"),
    ({"media": None, "dataset": "av_demo"}, "needs --split"),
    ({"labels": "/nowhere.txt"}, "--labels=/nowhere.txt"),
    ({"device": "cuda"}, "no CUDA GPU"),
    ({"audio_model": "msclap", "video_model": "none"}, "--msclap_python"),
  ],
)
def test_wrong_flags_are_refused(arguments, change, words):
  with pytest.raises(InputError, match=words):
    object_labels.run(arguments(**change))


def test_labels_of_any_list(tmp_path):
  assert len(object_labels.read_labels()) == 601
  text = tmp_path / "a.txt"
  text.write_text("\ufeffé x\r\n\n b \n", encoding="utf-8")
  assert object_labels.read_labels(str(text)) == ["é x", "b"]
  for said in (["é x", "b"], {"names": ["é x", "b"]}):
    (tmp_path / "a.JSON").write_text(json.dumps(said))
    assert object_labels.read_labels(str(tmp_path / "a.JSON")) == ["é x", "b"]
  for said, words in [
    ({"label": []}, "no list of names"), ([1], "no list of names"),
    ([], "is empty"), (["a", "a"], "'a' is listed twice"),
  ]:  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=words):
      object_labels.read_labels(str(tmp_path / "b.json"))


def test_the_command_takes_its_flags(tmp_path):
  done = subprocess.run(
    [
      sys.executable, "-m", "data_prep.object_labels", "--media=-x",
      "--audio_model=none", "--video_model=none", "--split=a,b",
      f"--output={tmp_path}",
    ],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 2 and "error: name --audio_model" in done.stderr
