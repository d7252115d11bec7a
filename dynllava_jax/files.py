"""Files written so that an interruption leaves the old one or the new one, never half of one."""

import os
import pathlib


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Writes to a temporary name in the same folder, then renames."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  temporary.write_bytes(content)
  os.replace(temporary, path)
