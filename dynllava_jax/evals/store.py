"""Answers on disk while they are made: appended batch by batch, so that a killed run loses and doubles none.

    answers/RUN.jsonl             LLaVA's answer rows; `metadata.row` numbers the question
    answers/RUN.provenance.json   what made them: config, checkpoint, versions, once more for every part of an interrupted run

Rows are appended in the order in which they are made, each with a digest of its own. A line that a kill cut off is dropped when the
run is started again.
Finished, the file is written once more in the order of the questions.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynllava_jax.data.images import MAX_BYTES
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.answers import DIGEST, digest, sealed
from dynllava_jax.evals.benchmarks.base import Question, unreadable
from dynllava_jax.evals.reading import LARGEST, read_lines, read_objects
from dynllava_jax.files import read_regular, write_atomically

LIBRARIES = ('jax', 'jaxlib', 'flax', 'numpy', 'orbax-checkpoint', 'pillow', 'sentencepiece')
# Between the parts of one run; a checkpoint is known by its digest, this is its path.
MAY_DIFFER = ('checkpoint', 'versions', 'source_sha256', 'batch_size', 'mesh', 'device')
READ = 2**31  # bytes of pictures that are digested whole
PARTS = 'later_parts'  # what differed when answers were added to those there, and how many there were


class AnswerStore:
  """The answer file of one run. `rows`: finished rows by question number."""

  def __init__(self, folder: pathlib.Path, run: str, provenance: Mapping[str, Any]):
    """Opens or begins `folder/RUN.jsonl`.

    Answers that something else made, by their provenance, are set aside as `RUN.previous-N.*`; `set_aside` names them, and `why`
    says what they are.
    """
    self.path = folder / f'{run}.jsonl'
    self._provenance_path = folder / f'{run}.provenance.json'
    self.set_aside: pathlib.Path | None = None
    folder.mkdir(parents=True, exist_ok=True)
    comparable = json.loads(json.dumps({k: v for k, v in provenance.items() if k not in MAY_DIFFER}))
    self._provenance = self._stored()
    before = {k: v for k, v in self._provenance.items() if k not in (*MAY_DIFFER, PARTS)}
    other = [k for k in dict.fromkeys([*comparable, *before]) if before.get(k) != comparable.get(k)]
    self.why = f'answers of another checkpoint or config ({", ".join(other)})'
    if not self._provenance:
      self.why = 'answers without a whole provenance beside them'
    if self.path.exists() and other:
      self._set_aside(folder, run)
    self._part: dict[str, Any] | None = {k: provenance[k] for k in MAY_DIFFER if k in provenance}
    if not self.path.exists():
      self._provenance, self._part = dict(provenance), None
      self._write_provenance()
    self.rows = self._read()

  def _stored(self) -> dict[str, Any]:
    try:
      return dict(read_objects(self._provenance_path))
    except (OSError, DataError):
      return {}

  def _write_provenance(self) -> None:
    write_atomically(self._provenance_path, (json.dumps(self._provenance, indent=1) + '\n').encode())

  def _set_aside(self, folder: pathlib.Path, run: str) -> None:
    number = 1
    while (folder / f'{run}.previous-{number}.jsonl').exists():
      number += 1
    self.set_aside = folder / f'{run}.previous-{number}.jsonl'
    os.replace(self.path, self.set_aside)
    if self._provenance_path.exists():
      os.replace(self._provenance_path, folder / f'{run}.previous-{number}.provenance.json')

  def _read(self) -> dict[int, dict[str, Any]]:
    """Whole rows; what follows the last line end is cut off. DataError for a damaged one."""
    if not self.path.exists():
      return {}
    try:
      content = read_regular(self.path, LARGEST)
    except OSError as e:
      raise DataError(f'{self.path}: cannot be read ({e.strerror}); move it away, and its questions are answered again') from None
    whole = content[: content.rfind(b'\n') + 1]
    if len(whole) < len(content):
      write_atomically(self.path, whole)
    rows = read_lines(self.path, self._damaged)
    found: dict[int, dict[str, Any]] = {}
    for i, row in enumerate(rows, 1):
      where = f'{self.path}, answer {i}'
      if not isinstance(row.get('metadata'), dict) or 'row' not in row['metadata']:
        self._damaged(f'{where}: lacks metadata.row')
      number, count = row['metadata']['row'], self._provenance.get('questions', math.inf)
      if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        self._damaged(f'{where}: metadata.row is {number!r}, expected the number of one of {count} questions')
      if number in found:
        self._damaged(f'{where}: question {number} was answered before')
      if row['metadata'].get(DIGEST) != digest(row):
        self._damaged(f'{where}: its {DIGEST} is not that of the row')
      found[number] = row
    return found

  def _damaged(self, message: str) -> None:
    raise DataError(f'{message}; delete the line, and its question is answered again')

  def add(self, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows; they are on disk when this returns."""
    if self._part is not None:  # the first that this process adds to what another made
      part = {'answers_before': len(self.rows)} | self._part
      self._provenance[PARTS] = [*self._provenance.get(PARTS, ()), part]
      self._write_provenance()
      self._part = None
    rows = [sealed(row) for row in rows]
    with open(self.path, 'ab') as file:
      file.write(''.join(json.dumps(row) + '\n' for row in rows).encode())
      file.flush()
      os.fsync(file.fileno())
    self.rows |= {row['metadata']['row']: row for row in rows}

  def finish(self) -> list[dict[str, Any]]:
    """Rewrites the file in the order of the questions; the rows."""
    rows = [self.rows[i] for i in sorted(self.rows)]
    write_atomically(self.path, ''.join(json.dumps(row) + '\n' for row in rows).encode())
    return rows


def versions() -> dict[str, str]:
  """Versions of Python and of the libraries that a number may depend on."""
  return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def source_sha256() -> str:
  """Digest of this package's own source."""
  package = pathlib.Path(__file__).parents[1]
  return folder_sha256(package, sorted(str(p.relative_to(package)) for p in package.rglob('*.py')))


def questions_sha256(questions: Sequence[Question]) -> str:
  """Digest of what is asked, in which order."""
  return hashlib.sha256(json.dumps([[q.id, q.text, q.reference] for q in questions]).encode()).hexdigest()


def pictures_sha256(questions: Sequence[Question]) -> str:
  """Digest of the pictures shown, in the order of the questions: of all bytes, or above `READ` of their sizes and of every k-th.

  Raises:
    DataError: a picture cannot be read; names its question.
  """
  shown = {_identity(q.image): q for q in questions if q.image is not None}
  sizes = {key: _size(q) for key, q in shown.items()}
  every = max(1, -(-sum(sizes.values()) // READ))
  digest = hashlib.sha256()
  for number, (key, question) in enumerate(shown.items()):
    content = _content(question) if number % every == 0 else b''
    digest.update(f'{sizes[key]} '.encode() + hashlib.sha256(content).digest())
  return digest.hexdigest()


def _identity(image: Any) -> Any:
  return image if isinstance(image, (bytes, pathlib.Path)) else id(image)


def _size(question: Question) -> int:
  image = question.image
  if not isinstance(image, pathlib.Path):
    return len(image) if isinstance(image, bytes) else image.nbytes
  try:
    return image.stat().st_size
  except OSError as e:
    raise unreadable(question, e) from None


def _content(question: Question) -> bytes:
  image = question.image
  if not isinstance(image, pathlib.Path):
    return image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
  try:
    return read_regular(image, MAX_BYTES)
  except OSError as e:
    raise unreadable(question, e) from None


def folder_sha256(folder: pathlib.Path, names: Iterable[str]) -> str:
  """Digest of files and of all files in subfolders, by name and content. `names`: paths in `folder` that exist or not."""
  digest = hashlib.sha256()
  for name in names:
    path = folder / name
    for file in sorted(p for p in (path.rglob('*') if path.is_dir() else [path]) if p.is_file()):
      digest.update(str(file.relative_to(folder)).encode())
      with open(file, 'rb') as f:
        digest.update(hashlib.file_digest(f, 'sha256').digest())
  return digest.hexdigest()
