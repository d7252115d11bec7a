"""Where benchmark data lies: LLaVA's layout of `playground/data/eval`. What question files name stays below their image folder."""

import dataclasses
import pathlib

from dynllava_jax import paths, remote
from dynllava_jax.data.samples import DataError
from dynllava_jax.files import below


@dataclasses.dataclass(frozen=True)
class Folder:
  """One benchmark's data.

  Attributes:
    root: what `--data` says.
    names: the benchmark's folder inside it; what lies directly in `root` is found too.
    labels: file or folder that replaces the labels' place in the layout, '' for none.
    allow_outside: images may lie outside of their folder: by `..`, as absolute paths, through links.
  """

  root: pathlib.Path
  names: tuple[str, ...]
  labels: str = ''
  allow_outside: bool = False

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
    try:
      return base / name if self.allow_outside else below(base, name)
    except ValueError as e:
      hint = 'name the file as it is called in there, or allow that with --config.allow_outside=True'
      raise DataError(f'{where}: image {name!r}: {e}; {hint}', 'outside_image') from None
    except OSError as e:
      raise DataError(
        f'{where}: image {name!r} cannot be looked for ({e.strerror}); is it the right file?', 'missing_image'
      ) from None
