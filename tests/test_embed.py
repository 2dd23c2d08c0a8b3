"""Embeddings of media folders and built splits, stopped and continued."""

import builtins
import json
import pathlib
import shutil
import subprocess
import sys
import wave

import numpy as np
import pyarrow.parquet
import pytest

import avjax
from avjax import config, embed, embed_parts, experiment
from avjax import model as model_lib
from avjax.checkpoint import Checkpoints
from avjax.data import pipeline
from avjax.errors import InputError
from avjax.workdir import workdir
from tests import runs


@pytest.fixture(scope="module")
def run_dir(demo_data, tmp_path_factory):
  """A run that has not begun to learn; its method embeds and predicts."""
  stage = runs.stage(
    "avmae_vgg_finetune", data__dir=demo_data, evals={}, checkpoint__best="",
    init_from="", schedule__warmup_epochs=0.0,
  )  # fmt: skip
  setup = experiment.build(runs.plain(stage))
  place = tmp_path_factory.mktemp("embed") / "run"
  run = workdir(place)
  with Checkpoints(run.checkpoints) as checkpoints:
    state = {"params": setup.init_state()["params"]}
    checkpoints.save(1, experiment.stored(setup.config, state))
  run.config.write_text(json.dumps(config.plain(setup.config)))
  names = {"label": list(pipeline.class_names(setup.config.data))}
  run.classes.write_text(json.dumps(names))
  return place


@pytest.fixture(scope="module")
def model(run_dir):
  return avjax.load(run_dir)


@pytest.fixture
def media(demo_data, tmp_path):
  """Seven files in three folders: six clips of which one has no picture, and
  one that is broken; other files are no media."""
  (clips,) = pathlib.Path(demo_data).glob("files_*/media")
  paths = sorted(clips.glob("test_*.mp4"))
  place = tmp_path / "media"
  for name, path in zip(
    ("-x.mp4", "b/é 1.MP4", "b/c/-2.mp4", "b/c/3.mp4", "z.mp4"),
    paths,
    strict=False,
  ):
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place / name)
  with wave.open(str(place / "b/sound.wav"), "wb") as sound:
    sound.setparams((1, 2, 16_000, 0, "NONE", ""))
    noise = np.random.default_rng(0).integers(-9_000, 9_000, 16_000)
    sound.writeframes(noise.astype("<i2").tobytes())
  (place / "b/broken.mp4").write_bytes(b"no film at all")
  (place / "b/notes.txt").write_text("-")
  (place / ".hidden.mp4").write_text("-")
  return place


IDS = ["-x.mp4", "b/c/-2.mp4", "b/c/3.mp4", "b/sound.wav", "b/é 1.MP4", "z.mp4"]


def load(path):
  with np.load(path) as arrays:
    return dict(arrays)


def test_a_folder_in_npz(model, media, tmp_path):
  output = tmp_path / "out.npz"
  output.write_text("what was there before")
  report = embed.run(model, embed.Files(media), output, batch_size=4)
  found = load(output)
  assert found["id"].tolist() == IDS
  assert set(found) == {"id", "audio", "video", "av", "has_audio", "has_video"}
  assert found["has_video"].tolist() == [True] * 3 + [False] + [True] * 2
  assert np.isnan(found["video"][3]).all()
  assert np.isfinite(np.delete(found["video"], 3, axis=0)).all()
  direct = model.embed([media / name for name in IDS])
  for name in ("audio", "av"):
    np.testing.assert_allclose(found[name], direct[name], atol=1e-5)
  assert report["clips"] == 7 and report["embedded"] == 6
  assert report["skipped_clips"].keys() == {"b/broken.mp4"}
  assert report["skipped_clips"]["b/broken.mp4"].startswith("corrupt: ")
  assert report["shapes"]["audio"] == [direct["audio"].shape[1]]
  saved = json.loads((tmp_path / "out.npz.report.json").read_text())
  assert saved == report
  assert not (tmp_path / "out.npz.parts").exists()


class Killed(BaseException):
  """Nothing catches it."""


@pytest.fixture
def stopped(model, media, tmp_path, monkeypatch):
  """A run that died in its third batch, as by SIGKILL; the output's path."""
  monkeypatch.setattr(embed_parts, "CLIPS", 2)
  compute, calls = embed._compute, []

  def die(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
      raise Killed
    return compute(*arguments)

  def leave(parts, *_):
    parts._lock.__exit__()

  output = tmp_path / "out.npz"
  with monkeypatch.context() as patch:
    patch.setattr(embed, "_compute", die)
    patch.setattr(embed_parts.Parts, "__exit__", leave)
    with pytest.raises(Killed):
      embed.run(model, embed.Files(media), output, batch_size=2)
  assert not output.exists()
  return output


def counted(monkeypatch):
  """The ids that are read from now on."""
  read, actual = [], pipeline.batch_of_files

  def note(paths, data):
    read.extend(path.name for path in paths)
    return actual(paths, data)

  monkeypatch.setattr(pipeline, "batch_of_files", note)
  return read


def test_a_stopped_run_goes_on(model, media, stopped, monkeypatch):
  parts = stopped.with_name("out.npz.parts")
  assert len(list(parts.glob("part_*.npz"))) == 2
  (parts / "part_000002.npz.1.tmp").write_bytes(b"half")
  read = counted(monkeypatch)
  report = embed.run(model, embed.Files(media), stopped, batch_size=2)
  assert len(read) == 3 and "broken.mp4" in read
  assert report["of_these_before"] == 4 and report["embedded"] == 6
  whole = stopped.with_name("whole.npz")
  embed.run(model, embed.Files(media), whole, batch_size=2)
  expected = load(whole)
  for name, rows in load(stopped).items():
    np.testing.assert_array_equal(rows, expected[name])


def test_changed_files_and_damaged_parts_are_done_again(
  model, media, stopped, monkeypatch
):
  parts = sorted(stopped.with_name("out.npz.parts").glob("part_*.npz"))
  parts[1].write_bytes(parts[1].read_bytes()[:-200])
  with np.load(parts[0]) as arrays:
    kept, changed = arrays["id"].tolist()
  shutil.copy(media / kept, media / changed)
  read = counted(monkeypatch)
  report = embed.run(model, embed.Files(media), stopped, batch_size=2)
  assert report["of_these_before"] == 1 and len(read) == 6
  found = load(stopped)
  ids = found["id"].tolist()
  a, b = ids.index(kept), ids.index(changed)
  np.testing.assert_allclose(found["audio"][a], found["audio"][b], atol=1e-6)


def test_parts_of_another_model_are_not_mixed_in(
  model, media, stopped, monkeypatch
):
  monkeypatch.setattr(embed_parts, "fingerprint", lambda params: "other")
  with pytest.raises(InputError, match="parameters: '.*' -> 'other'.*remove"):
    embed.run(model, embed.Files(media), stopped)


def test_two_runs_do_not_write_the_same_file(model, media, tmp_path):
  job = embed._job(model, False)
  files, output = embed.Files(media), tmp_path / "out.npz"
  refused = pytest.raises(InputError, match="another run writes to")
  with embed_parts.Parts(output, job), refused:
    embed.run(model, files, output)


def test_predictions_in_parquet(model, media, tmp_path):
  output = tmp_path / "out.parquet"
  embed.run(model, embed.Files(media), output, batch_size=4, predict=True)
  table = pyarrow.parquet.read_table(output)
  assert table["id"].to_pylist() == IDS
  logits = np.array(table["logits/label"].to_pylist())
  direct = model.predict([media / name for name in IDS])["label"]
  np.testing.assert_allclose(logits, direct, atol=1e-5)
  metadata = table.schema.metadata
  classes = json.loads(metadata[b"classes"])["label"]
  assert classes == list(model.class_names["label"])
  assert json.loads(metadata[b"shapes"])["logits/label"] == [len(classes)]


def test_a_built_split(model, tmp_path):
  data = model.config.data.copy_and_resolve_references().unlock()
  data.heads = ()
  output = tmp_path / "out.npz"
  report = embed.run(model, embed.Stored(data, "test"), output, batch_size=16)
  found = load(output)
  batch = next(pipeline.eval_batches(data, split="test", batch_size=24))
  order = np.argsort(batch["id"])
  assert found["id"].tolist() == [batch["id"][k] for k in order]
  assert report["embedded"] == 24 and report["skipped"] == 0
  direct = model.embed({k: v for k, v in batch.items() if k != "id"})
  np.testing.assert_allclose(found["video"], direct["video"][order], atol=1e-5)


def test_many_files_go_in_chunks_of_one_size(model, media, monkeypatch):
  monkeypatch.setattr(model_lib, "CHUNK", 4)
  paths = [media / name for name in IDS]
  sizes, batch_of = [], model.batch
  monkeypatch.setattr(
    pipeline, "batch_of_files",
    lambda some, data, read=pipeline.batch_of_files: (
      sizes.append(len(some)) or read(some, data)
    ),
  )  # fmt: skip
  chunked = model.embed(paths)
  assert sizes == [4, 2]
  whole = model.embed(batch_of(paths))
  for name, rows in chunked.items():
    np.testing.assert_allclose(rows, whole[name], atol=1e-5)
  with pytest.raises(InputError, match="no media files were given"):
    model.embed([])
  with pytest.raises(InputError, match="given by its path, not as int"):
    pipeline.media_files(3)
  for paths in (b"a.mp4", [b"a.mp4"]):
    with pytest.raises(InputError, match="given by its path, not as bytes"):
      pipeline.media_files(paths)


def test_a_run_of_an_earlier_version_is_loaded(run_dir, model, tmp_path):
  place = tmp_path / "run"
  place.mkdir()
  (place / "checkpoints").symlink_to(run_dir / "checkpoints")
  saved = json.loads((run_dir / "config.json").read_text())
  del saved["log_every"], saved["data"]["fbank"]["remove_dc"]
  (place / "config.json").write_text(json.dumps(saved))
  loaded = avjax.load(place)
  assert loaded.config.data.fbank.remove_dc is True
  assert loaded.config.model.width == model.config.model.width


def test_what_cannot_be_done_is_refused(model, media, tmp_path, monkeypatch):
  def run(path, name="o.npz", **options):
    return embed.run(model, embed.Files(path), tmp_path / name, **options)

  with pytest.raises(InputError, match="no media files in"):
    (tmp_path / "none").mkdir()
    run(tmp_path / "none")
  with pytest.raises(InputError, match="nowhere is not a folder"):
    run(tmp_path / "nowhere")
  with pytest.raises(InputError, match="Did you mean '.npz'"):
    run(media, "o.np")
  with pytest.raises(InputError, match="not a folder"):
    run(media, "x/o.npz")
  with pytest.raises(InputError, match="none of 1 clips.*b.*corrupt"):
    run(media / "b/broken.mp4")
  assert not list(tmp_path.glob("*.parts"))
  actual = builtins.__import__

  def without(name, *arguments):
    if name.startswith("pyarrow"):
      raise ImportError(name)
    return actual(name, *arguments)

  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(InputError, match=r"pip install 'avjax\[parquet\]'"):
    run(media, "o.parquet")


def test_command(run_dir, media, tmp_path):
  arguments = [
    sys.executable, "-m", "avjax.embed", f"--model={run_dir}",
    f"--media={media}", f"--output={tmp_path / 'out.npz'}", "--batch_size=8",
    "--predict",
  ]  # fmt: skip
  _, env = runs.command("avmae_vgg", tmp_path)
  done = subprocess.run(
    arguments, env=env, cwd=runs.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "6 of 7 clips" in done.stdout and "1 skipped" in done.stdout
  found = load(tmp_path / "out.npz")
  assert found["logits/label"].shape == (6, len(found["classes/label"]))
