"""Checkpoints on the Hugging Face hub: `hf:ORG/NAME`, or `hf:ORG/NAME@REVISION`, to a folder on this machine.

huggingface_hub does the fetching: interrupted downloads go on, what is there is not fetched again, and its variables hold
(`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). Only what conversion reads is fetched; what was fetched now must have the
digest that the hub states.
"""

import hashlib
import pathlib
import re
from typing import Any

from dynllava_jax.config import MODEL_FILES, TOKENIZER_FILES
from dynllava_jax.files import write_atomically

PREFIX = 'hf:'
NAME = re.compile(r'[\w.-]+/[\w.-]+')
BESIDE = (*MODEL_FILES, 'adapter_config.json', *TOKENIZER_FILES)
# Weights in their order: of the first form that is there, all files are taken.
WEIGHTS = (
  re.compile(r'model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json'),
  re.compile(r'pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json'),
)
PARTS = (
  ('adapter_model.safetensors', 'adapter_model.bin'),
  ('non_lora_trainables.safetensors', 'non_lora_trainables.bin'),
  ('mm_projector.bin',),
)


class HubError(OSError):
  """What cannot be had from the hub; the message says why and what to do."""


def is_hub(text: str | None) -> bool:
  """Whether a flag or an argument names a repository of the hub."""
  return text is not None and text.startswith(PREFIX)


def split(text: str, where: str) -> tuple[str, str | None]:
  """(ORG/NAME, revision or None) of `hf:ORG/NAME[@REVISION]`; HubError if it is not written so."""
  name, _, revision = text.removeprefix(PREFIX).partition('@')
  if not NAME.fullmatch(name) or ('@' in text and not revision):
    raise HubError(f'{where}: {text}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION, such as hf:llava-hf/llava-1.5-7b-hf')
  return name, revision or None


def wanted(names: list[str]) -> list[str]:
  """Those files of a repository that conversion reads."""
  found = [name for name in names if name in BESIDE]
  found += next((of for form in WEIGHTS if (of := [n for n in names if form.fullmatch(n)])), [])
  return found + [next(n for n in part if n in names) for part in PARTS if set(part) & set(names)]


def fetched(text: str, where: str) -> pathlib.Path:
  """The folder with a repository's files.

  Args:
    text: `hf:ORG/NAME[@REVISION]`.
    where: the flag or argument, for messages.

  Raises:
    HubError: no such repository or revision, no access, no network and not all files here, or a file that arrived damaged.
  """
  import huggingface_hub  # here, because it takes half a second
  from huggingface_hub import constants, errors

  name, revision = split(text, where)
  try:
    if constants.HF_HUB_OFFLINE:
      return pathlib.Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    files = {file.rfilename: file for file in info.siblings}
    names = wanted(list(files))
    if not any(n.endswith(('.safetensors', '.bin')) for n in names):
      some = ', '.join(sorted(files)[:5])
      raise HubError(f'{where}: {text}: holds no weights that are read ({some}); expected safetensors or .bin')
    paths = [_one(name, info.sha, files[n], where, text) for n in names]
    if revision != info.sha:  # all are there: which commit a name meant is kept where huggingface_hub looks without network
      ref = paths[0].parents[2] / 'refs' / (revision or constants.DEFAULT_REVISION)
      ref.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(ref, info.sha.encode())
    return paths[0].parent
  except HubError:
    raise
  except errors.GatedRepoError:
    why = 'access is granted on request; ask for it on its page, and set HF_TOKEN'
  except errors.RepositoryNotFoundError:
    why = 'there is no such repository, or it is private (then set HF_TOKEN)'
  except errors.RevisionNotFoundError:
    why = f'has no revision {revision}'
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
    why = 'is not on this machine, and the hub is not asked (offline); fetch it once with network'
  except Exception as e:  # of the network, of many types
    why = f'cannot be fetched ({" ".join(str(e).split())[:200] or type(e).__name__}); the same command goes on where it stopped'
  raise HubError(f'{where}: {text}: {why}') from None


def _one(name: str, commit: str, file: Any, where: str, text: str) -> pathlib.Path:
  """One file, compared with its digest if it was fetched now; a damaged one is removed."""
  import huggingface_hub

  here = huggingface_hub.try_to_load_from_cache(name, file.rfilename, revision=commit)
  if isinstance(here, str):
    return pathlib.Path(here)
  path = pathlib.Path(huggingface_hub.hf_hub_download(name, file.rfilename, revision=commit))
  stated = file.lfs.sha256 if file.lfs else None
  with open(path, 'rb') as content:
    if stated in (None, hashlib.file_digest(content, 'sha256').hexdigest()):
      return path
  path.resolve().unlink()
  path.unlink(missing_ok=True)
  raise HubError(f'{where}: {text}: {file.rfilename} arrived damaged, its digest is not the one that the hub states; try again')
