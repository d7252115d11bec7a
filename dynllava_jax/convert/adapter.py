"""`adapter_config.json`: every field that changes the arithmetic, as PEFT 0.21 takes it, or refused.

PEFT's rules are those of `tuners/lora` and `tuners/tuners_utils.py` there (https://github.com/huggingface/peft): which modules are
targeted, which pattern gives a module its rank and alpha, which modules are saved whole.
"""

import contextlib
import math
import pathlib
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from dynllava_jax.convert.inputs import ConversionError, read_json
from dynllava_jax.convert.layouts import ADAPTER_CONFIG

# Each of these, if it is set, makes of an adapter something other than a product that is added to a weight.
NOT_PLAIN = (
  'lora_bias',
  'layer_replication',
  'target_parameters',
  'trainable_token_indices',
  'alora_invocation_tokens',
  'use_qalora',
  'use_bdlora',
  'arrow_config',
  'kasa_config',
  'monteclora_config',
  'velora_config',
  'megatron_config',
)
HONOURED = (
  'r',
  'lora_alpha',
  'use_rslora',
  'use_dora',
  'rank_pattern',
  'alpha_pattern',
  'target_modules',
  'exclude_modules',
  'layers_to_transform',
  'layers_pattern',
  'modules_to_save',
  'bias',
  'init_lora_weights',
)
# Of training alone, of the way it began, or about the file itself; PEFT takes fan_in_fan_out for false in linear layers.
WITHOUT_EFFECT = (
  'peft_type',
  'task_type',
  'peft_version',
  'auto_mapping',
  'base_model_name_or_path',
  'revision',
  'inference_mode',
  'lora_dropout',
  'fan_in_fan_out',
  'megatron_core',
  'loftq_config',
  'eva_config',
  'corda_config',
  'lora_ga_config',
  'runtime_config',
  'qalora_group_size',
  'ensure_weight_tying',
)
# The others (PiSSA, OLoRA, CorDA ...) change the base before they train, and their pairs belong to the changed one.
BASE_UNTOUCHED = (True, False, None, 'gaussian', 'orthogonal', 'eva')
ALL_LINEAR = 'all-linear'
MATCHING_SECONDS = 10.0  # for one module's name; some patterns take longer than anybody waits
LARGEST_ALPHA = 1e6  # above it a sum in float32 holds nothing of the base any more


class Adapter:
  """The settings of a LoRA adapter. Modules are given by all their names, the newest first (`layouts.spellings`)."""

  def __init__(self, directory: pathlib.Path):
    """ConversionError if the settings are incomplete, contradict each other, or are not those of plain LoRA."""
    self.file = directory / ADAPTER_CONFIG
    self.config = config = read_json(self.file)
    start = config.get('init_lora_weights', True)
    if start not in BASE_UNTOUCHED:
      self._refuse(
        f'init_lora_weights is {start!r}, so the adapter belongs to a base that its training changed first; save it with PEFT as '
        'plain LoRA of the original base (path_initial_model_for_weight_conversion)'
      )
    strange = [n for n in NOT_PLAIN if config.get(n)] + ['peft_type'] * (config.get('peft_type', 'LORA') != 'LORA')
    if strange:
      self._refuse(f'only LoRA and DoRA adapters can be merged, this one sets {", ".join(strange)}')
    self._choice('bias', 'none', ('none', 'all', 'lora_only'))
    for name in ('use_rslora', 'use_dora'):
      self._choice(name, False, (True, False, None))
    for name in ('r', 'lora_alpha'):
      if name not in config:
        self._refuse(f"key '{name}' is missing")
    self.ranks, self.alphas = self._numbers('rank_pattern'), self._numbers('alpha_pattern')
    for rank in (config['r'], *self.ranks.values()):
      for alpha in (config['lora_alpha'], *self.alphas.values()):
        if not (type(rank) is int and rank > 0 and type(alpha) in (int, float) and abs(alpha) <= LARGEST_ALPHA):
          self._refuse(
            f'r is {rank!r} and lora_alpha {alpha!r}, expected a positive whole number and a number of at most {LARGEST_ALPHA:g}'
          )
    self.modules_to_save = self._names('modules_to_save') or []
    self.targets, self.excluded = self._names('target_modules', True), self._names('exclude_modules', True) or []
    self.layers, self.layer_lists = config.get('layers_to_transform'), self._names('layers_pattern') or []
    self.layers = [self.layers] if type(self.layers) is int else self.layers or []
    if not isinstance(self.layers, list) or not all(type(i) is int for i in self.layers):
      self._refuse(f'layers_to_transform is {self.layers!r}, expected whole numbers')
    if self.layers and isinstance(self.targets, str):
      self._refuse(
        f'layers_to_transform is {self.layers} beside the pattern {self.targets!r} in target_modules; PEFT takes only one'
      )
    for pattern in self._patterns():
      try:
        re.compile(pattern)
      except (re.error, RecursionError, OverflowError) as e:
        self._refuse(f'{pattern!r} is not a regular expression ({e})')

  @property
  def scales_rows(self) -> bool:
    """Whether the rows of a weight with its pair are brought to lengths of their own (DoRA, arXiv 2402.09353)."""
    return bool(self.config.get('use_dora'))

  @property
  def unknown(self) -> list[str]:
    """Fields that are set and that PEFT does not have."""
    return [n for n, v in self.config.items() if v and n not in NOT_PLAIN + HONOURED + WITHOUT_EFFECT]

  def rank_and_scale(self, names: tuple[str, ...], name: str) -> tuple[int, float]:
    """(rank, factor of B A) of the module that the adapter calls `name`; ConversionError if that depends on which name counts."""
    with self._bounded():
      found = [self._rank_and_scale(n) for n in (name, *names)]
    if found[0] != found[1]:
      self._refuse(
        f'rank_pattern or alpha_pattern fits {name}, but not {names[0]}, as transformers calls it now; use a part of both'
      )
    return found[0]

  def targeted(self, names: Iterable[str]) -> bool:
    """Whether PEFT would give a module matrices of its own."""
    with self._bounded():
      return any(self._targeted(n) for n in names)

  def saves(self, names: Iterable[str]) -> list[str]:
    """Which entries of modules_to_save a tensor belongs to."""
    parents = {n.rsplit('.', i)[0] for n in names for i in range(1, n.count('.') + 1)}
    return [m for m in self.modules_to_save if any(p.endswith(m) for p in parents)]

  @contextlib.contextmanager
  def _bounded(self) -> Iterator[None]:
    """ConversionError if matching takes too long: patterns can backtrack for ages. `re` looks at signals while it does."""
    if threading.current_thread() is not threading.main_thread():  # signals come to that one alone
      yield
      return

    def stop(*_):
      self._refuse(f'one of its patterns ({", ".join(map(repr, self._patterns()))}) takes too long to match; list the modules')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MATCHING_SECONDS)
    try:
      yield
    finally:
      signal.setitimer(signal.ITIMER_REAL, 0)
      signal.signal(signal.SIGALRM, before)

  def _rank_and_scale(self, name: str) -> tuple[int, float]:
    rank, alpha = (
      next((v for pattern, v in group.items() if re.match(rf'(.*\.)?({pattern})$', name)), self.config[field])
      for group, field in ((self.ranks, 'r'), (self.alphas, 'lora_alpha'))
    )
    return rank, alpha / (math.sqrt(rank) if self.config.get('use_rslora') else rank)

  def _targeted(self, name: str) -> bool:
    if _fits(self.excluded, name) or any(re.match(rf'(^|.*\.){m}($|\..*)', name) for m in self.modules_to_save):
      return False
    if self.targets is None:  # not said; PEFT has a list per model type
      return True
    if self.targets == ALL_LINEAR:
      return not name.endswith('lm_head')
    if not _fits(self.targets, name):
      return False
    if not self.layers:
      return True
    lists = [rf'(?:^|.*?\.){p}\.(\d+)\.' for p in self.layer_lists] or [r'.*?\.[^.]*\.(\d+)\.']
    found = next((m for m in (re.match(p, name) for p in lists) if m), None)
    return found is not None and int(found.group(1)) in self.layers

  def _patterns(self) -> list[str]:
    whole = [s for s in (self.targets, self.excluded) if isinstance(s, str)]
    return [*whole, *self.ranks, *self.alphas, *self.modules_to_save, *self.layer_lists]

  def _numbers(self, field: str) -> dict[str, Any]:
    value = self.config.get(field) or {}
    if not isinstance(value, dict):
      self._refuse(f'{field} is {value!r}, expected numbers by module name')
    return value

  def _names(self, field: str, pattern: bool = False) -> Any:
    value = self.config.get(field)
    if value is None or (pattern and isinstance(value, str)):
      return value
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
      self._refuse(f'{field} is {self.config[field]!r}, expected names of modules')
    return value

  def _choice(self, field: str, default: Any, choices: tuple) -> None:
    value = self.config.get(field, default)
    if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
      self._refuse(f'{field} is {value!r}, expected one of {", ".join(map(str, choices))}')

  def _refuse(self, reason: str) -> None:
    raise ConversionError(f'{self.file}: {reason}')


def _fits(wanted: list[str] | str, name: str) -> bool:
  """A pattern fits a whole name, an entry of a list its end."""
  if isinstance(wanted, str):
    return bool(re.fullmatch(wanted, name))
  return any(name == w or name.endswith(f'.{w}') for w in wanted)
