"""Where benchmark data lies: LLaVA's layout of `playground/data/eval`. What question files name stays below their image folder."""

import dataclasses
import functools
import os
import pathlib

from dynllava_jax import paths, remote
from dynllava_jax.data.samples import DataError


@dataclasses.dataclass(frozen=True)
class Folder:
  """One benchmark's data.

  Attributes:
    root: what `--data` says.
    names: the benchmark's folder inside it; what lies directly in `root` is found too.
    labels: file or folder that replaces the labels' place in the layout, '' for none.
    follow_links: whether a link in an image folder may lead out of it.
  """

  root: pathlib.Path
  names: tuple[str, ...]
  labels: str = ''
  follow_links: bool = False

  def find(self, *relative: str) -> pathlib.Path | None:
    """The first of these paths that exists in the benchmark's folder or in `root`."""
    places = [self.root / name / path for name in self.names for path in relative] + [self.root / path for path in relative]
    return next((p for p in places if remote.here(p).exists()), None)

  def need(self, *relative: str) -> pathlib.Path:
    """As `find`; DataError with the places looked at if there is none."""
    found = self.find(*relative)
    if found is None:
      wanted = ' or '.join(str(self.root / self.names[0] / path) for path in relative)
      raise DataError(f'{wanted}: missing; `python eval.py --check_data --data={self.root}` says where to get it')
    return found

  def need_labels(self, *relative: str) -> pathlib.Path:
    """The labels: `labels` if given, else as `need`."""
    if not self.labels:
      return self.need(*relative)
    path = remote.fetched(paths.given(self.labels, 'config.labels'))
    if not path.exists():
      raise DataError(f'config.labels: {path} does not exist; is the path right?')
    return path

  def image(self, base: pathlib.Path, name: str, where: str) -> pathlib.Path:
    """The file that a question calls `name`, in the image folder `base`.

    Raises:
      DataError: it lies, or a link leads, outside of `base`.
    """
    parts = pathlib.PurePath(name).parts
    if not parts or os.path.isabs(name) or '..' in parts or '\0' in name:
      raise DataError(f'{where}: image is {name!r}, expected a path below {base}; name the file as it is called in there')
    path = base / name
    if not self.follow_links and not _stays_in(base, path):
      raise DataError(
        f'{where}: image {name!r} is a link out of {base}; copy the file, or allow it with --config.follow_links=True'
      )
    return path


def _stays_in(base: pathlib.Path, path: pathlib.Path) -> bool:
  """Whether links, if there are any between `base` and the file, stay in `base`; one look at the disk for most files."""
  here, parent = _resolved(str(base)), _resolved(str(path.parent))
  end = os.path.realpath(path) if os.path.islink(path) else parent
  return all(os.path.commonpath((here, place)) == here for place in (parent, end))


@functools.lru_cache(1024)
def _resolved(folder: str) -> str:
  return os.path.realpath(folder)
