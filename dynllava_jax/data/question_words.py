"""Questions in the words of CLIP's text tower, for methods that choose image tokens by what is asked."""

from collections.abc import Mapping

from dynllava_jax.config import CLIP_TOKENIZER_FILES, ClipTextConfig, ConfigError
from dynllava_jax.data.tokenizer import CONFIG_FILE, FastTokenizer, read_table

FOLDER = 'vision/'  # of a checkpoint's assets


class QuestionWords:
  """CLIP's tokenizer."""

  def __init__(self, assets: Mapping[str, bytes], cfg: ClipTextConfig):
    """ConfigError if a checkpoint's `assets` hold no such tokenizer, or one of another vocabulary."""
    files = {n: assets[FOLDER + n] for n in CLIP_TOKENIZER_FILES if FOLDER + n in assets}
    if not files.keys() & {'tokenizer.json', 'vocab.json'}:
      raise ConfigError(
        "the checkpoint has no tokenizer of CLIP's text tower (assets/vision/tokenizer.json, or vocab.json and merges.txt); "
        'copy it to the CLIP directory and convert again'
      )
    if CONFIG_FILE not in files or 'tokenizer_class' not in read_table(files, CONFIG_FILE):
      raise ConfigError(f"{CONFIG_FILE} of CLIP's text tower is missing or names no tokenizer_class; CLIP's is CLIPTokenizer")
    self._tokenizer = FastTokenizer(files)
    begin, end = self._tokenizer.bos_id, self._tokenizer.eos_id
    wanted = len(self._tokenizer) - 1 if cfg.end_id is None else cfg.end_id
    if begin is None or end != wanted or len(self._tokenizer) > cfg.vocab_size:
      raise ConfigError(
        f"the tokenizer of CLIP's text tower begins texts with {begin}, ends them with {end}, has {len(self._tokenizer)} tokens; "
        f'the tower ends them with {wanted} and has {cfg.vocab_size}; take the files that lie beside its weights'
      )

  def ids(self, text: str) -> list[int]:
    """Token ids of a question, begin and end among them, however long it is."""
    return [self._tokenizer.bos_id, *(i for i, _ in self._tokenizer.encode(text)), self._tokenizer.eos_id]
