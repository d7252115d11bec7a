"""Small files that others wrote: plain files of a plausible length, and JSON that is what it should be."""

import json
import pathlib
import stat
from typing import Any

SMALL_BYTES = 2**28  # configs, tokenizers and indices are shorter by far
KINDS = {
  stat.S_IFDIR: 'a directory',
  stat.S_IFIFO: 'a pipe',
  stat.S_IFSOCK: 'a socket',
  stat.S_IFCHR: 'a device',
  stat.S_IFBLK: 'a device',
}


class ConversionError(RuntimeError):
  """A checkpoint that cannot be converted; the message names file and key."""


def check_file(path: pathlib.Path, at_most: int | None = None) -> None:
  """ConversionError unless it is a plain file, of `at_most` so many bytes; a pipe or a device may be read forever."""
  try:
    status = path.stat()
  except FileNotFoundError:
    raise ConversionError(f'{path}: missing') from None
  except (OSError, ValueError) as e:  # ValueError: a path that no file can have
    raise ConversionError(f'{path}: cannot be read ({e})') from None
  if not stat.S_ISREG(status.st_mode):
    raise ConversionError(f'{path}: is {KINDS.get(stat.S_IFMT(status.st_mode), "no file")}, expected a plain file')
  if at_most is not None and status.st_size > at_most:
    raise ConversionError(f'{path}: {status.st_size:,} bytes long, expected at most {at_most:,}; is it the right file?')


def read_small(path: pathlib.Path) -> bytes:
  """The content of a config, tokenizer or the like; ConversionError if it cannot be one."""
  check_file(path, SMALL_BYTES)
  try:
    return path.read_bytes()
  except OSError as e:
    raise ConversionError(f'{path}: cannot be read ({e.strerror})') from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file; ConversionError if it is missing or broken."""
  try:
    content = json.loads(read_small(path).decode('utf-8-sig'))
  except UnicodeDecodeError as e:
    raise ConversionError(f'{path}: not valid JSON (not UTF-8 text, {e.reason} at byte {e.start:,}); save it as UTF-8') from None
  except ValueError as e:  # also numbers of thousands of digits
    raise ConversionError(f'{path}: not valid JSON ({e})') from None
  except RecursionError:
    raise ConversionError(f'{path}: not usable JSON (nested too deeply)') from None
  if not isinstance(content, dict):
    raise ConversionError(f'{path}: holds a {type(content).__name__}, expected an object with named entries')
  return content


def nested(path: pathlib.Path, config: dict[str, Any], key: str) -> dict[str, Any]:
  """The group of entries `key` of a config, empty if it is not there; ConversionError if it is something else."""
  value = {} if config.get(key) is None else config[key]
  if not isinstance(value, dict):
    raise ConversionError(f'{path}: {key} is {value!r}, expected an object with named entries')
  return value
