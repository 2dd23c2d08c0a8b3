"""Progress of long work; see `avjax.progress`."""

from avjax.progress import track

__all__ = ["track"]
