"""Merging a LoRA or DoRA adapter (arXiv 2106.09685, 2402.09353) as PEFT saves it, and LLaVA's `non_lora_trainables.bin`."""

import dataclasses
import pathlib
import re

import numpy as np

from dynllava_jax.convert.adapter import ALL_LINEAR, Adapter
from dynllava_jax.convert.inputs import ConversionError
from dynllava_jax.convert.layouts import ADAPTER_CONFIG, Layout, canonical, peft_name, spellings
from dynllava_jax.convert.readers import FLOATS, Tensor, by_name, check_filled, file_tensors, weights_of

ADAPTERS = ('adapter_model.safetensors', 'adapter_model.bin')
TRAINED_WHOLE = ('non_lora_trainables.safetensors', 'non_lora_trainables.bin')
TIED = ('model.embed_tokens.weight', 'lm_head.weight')
Pair = dict[str, Tensor]  # by A and B, and M: the lengths of the rows, of DoRA
PAIRED = re.compile(
  r'(.*)\.lora_(?:(?P<half>[AB])(?:\.default)?\.weight|(?P<embedded>embedding_[AB])(?:\.default)?'
  r'|(?P<lengths>magnitude_vector)(?:\.default)?(?:\.weight)?)'
)
WRAPPERS = re.compile(r'\.(base_layer|modules_to_save(\.default)?)(?=\.)')  # PEFT's own levels in a name


def merge(directory: pathlib.Path, base: dict[str, Tensor], layout: Layout, tied: bool, notes: list[str]) -> dict[str, Tensor]:
  """Base tensors by name, with `scale * B A` added where the adapter has a pair; the sum is taken in float32.

  With DoRA each row of the sum is then brought to the length that the adapter says.

  What the adapter, or `non_lora_trainables.bin` (projector, predictors), holds whole takes the place of the base's.

  Args:
    directory: the adapter.
    base: the base's tensors by the converter's names.
    layout: the base's, in whose names PEFT targets modules.
    tied: whether the base's head is its embedding.
    notes: is told what was merged.

  Raises:
    ConversionError: missing file, half a pair, a pair for a weight that the base does not have, a kind of adapter
      other than these, or settings and matrices that do not belong together.
  """
  adapter = Adapter(directory)
  file = next((directory / n for n in ADAPTERS if (directory / n).exists()), None)
  if file is None:
    raise ConversionError(f'{directory}: has {ADAPTER_CONFIG} but none of {", ".join(ADAPTERS)}')
  pairs, trained = _split(adapter, file, base, layout)
  beside = next((directory / n for n in TRAINED_WHOLE if (directory / n).exists()), None)
  more = by_name((k, t) for t in _tensors(beside) if (k := canonical(Layout.LORA, t.key)) is not None) if beside else {}
  for key in trained.keys() & more.keys():
    if trained[key].shape != more[key].shape or not np.array_equal(trained[key].load(), more[key].load()):
      raise ConversionError(
        f'{beside}: {more[key].key} differs from {trained[key].key} in {file}; remove the one that is not meant'
      )
  _check_whole(adapter, base, layout, trained | more, file)
  whole, touched = (trained | more).keys(), set(TIED) & (pairs.keys() | trained.keys() | more.keys())
  if tied and touched and not (whole >= set(TIED) and pairs.keys().isdisjoint(TIED)):
    raise ConversionError(
      f'{file}: changes {min(touched)}, but the config of the base says that embedding and head are one (tie_word_embeddings); '
      'merge it with PEFT first, into a base whose head is its own'
    )
  merged, scales = base | trained | more, set()
  for key, pair in pairs.items():
    if not pair.keys() >= {'A', 'B'}:
      there = {'A': 'lora_A', 'B': 'lora_B', 'M': 'lora_magnitude_vector'}[min(pair)]
      raise ConversionError(f'{file}: {key} has {there} but not its other half')
    if adapter.scales_rows != ('M' in pair):
      raise ConversionError(
        f'{adapter.file}: use_dora is {adapter.scales_rows}, but {file} has {"a" if "M" in pair else "no"} lora_magnitude_vector '
        f'for {key}; one of the two files is not of this adapter'
      )
    scales.add(scale := _scale(adapter, layout, key, pair, file))
    merged[key] = _merged(merged[key], pair, scale, file)
  _check_targets(adapter, base, layout, pairs, file, notes)
  notes.append(f'merged {len(pairs)} LoRA pairs (scale {" or ".join(f"{s:g}" for s in sorted(scales))}) from {file}')
  if trained:
    notes.append(f'took {len(trained)} tensors whole from {file}')
  if more:
    notes.append(f'took {len(more)} tensors from {beside}')
  if adapter.unknown:
    notes.append(f'{adapter.file}: {", ".join(adapter.unknown)} passed over, as PEFT does, which has no such fields')
  if other := [f.name for f in weights_of(directory)]:
    notes.append(f'passed over {", ".join(other)} beside the adapter, as transformers does')
  return merged


def _tensors(file: pathlib.Path) -> list[Tensor]:
  tensors = file_tensors(file)
  check_filled(tensors)
  return tensors


def _split(
  adapter: Adapter, file: pathlib.Path, base: dict[str, Tensor], layout: Layout
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
  """(the two matrices of each weight by its name, tensors that are there whole by theirs) of an adapter file."""
  pairs: dict[str, Pair] = {}
  whole, bare = [], set()
  for tensor in _tensors(file):
    found = PAIRED.fullmatch(tensor.key)
    name = WRAPPERS.sub('', f'{found.group(1)}.weight' if found else tensor.key)
    key = canonical(Layout.LORA, name)
    if key is None or '.original_module.' in name:
      continue
    if not found and 'lora_' in name:
      raise ConversionError(f'{file}: {tensor.key} is no matrix of LoRA or DoRA; only such adapters can be merged')
    if found and key not in base:
      raise ConversionError(f'{file}: adapts {key}, which the base does not have; is --base the model it was trained on?')
    if key in base and peft_name(name) not in (names := spellings(layout, key)):
      raise ConversionError(
        f'{file}: {tensor.key} is named as in another layout; the base calls it {names[0]}, and PEFT passes it over'
      )
    if not found:
      whole.append((key, tensor))
      bare |= {key} if name == tensor.key else set()
      continue
    half, tensor = _half(found['half'] or found['embedded'] or found['lengths'], tensor)
    pair = pairs.setdefault(key, {})
    if half in pair:
      raise ConversionError(f'{file}: {tensor.key} is there a second time (after {pair[half].key})')
    pair[half] = tensor
  for key in sorted(bare):
    if key in pairs or (adapter.targets is not None and adapter.targeted(n.rpartition('.')[0] for n in spellings(layout, key))):
      raise ConversionError(
        f'{file}: holds {key} whole, but {adapter.file} targets its module, so PEFT would pass it over; PEFT names what it trained '
        'there base_layer.' + key.rpartition('.')[2]
      )
  return pairs, by_name(whole)


def _half(name: str, tensor: Tensor) -> tuple[str, Tensor]:
  """Which part of a pair a tensor is, by PEFT's name. Those of an embedding lie the other way round: it is [vocabulary, width]."""
  if not name.startswith('embedding_'):
    return {'A': 'A', 'B': 'B'}.get(name, 'M'), tensor
  turned = dataclasses.replace(tensor, shape=tensor.shape[::-1], read=lambda: np.ascontiguousarray(tensor.load().T))
  return ('B' if name.endswith('A') else 'A'), turned


def _check_whole(adapter: Adapter, base: dict[str, Tensor], layout: Layout, trained: dict[str, Tensor], file: pathlib.Path) -> None:
  """ConversionError unless everything that modules_to_save names is there."""
  there = {m for key in trained for m in adapter.saves((*spellings(layout, key), key))}
  lost = [k for k in base if k not in trained and adapter.saves(spellings(layout, k))]
  absent = [m for m in adapter.modules_to_save if m not in there]
  if absent or lost:
    raise ConversionError(
      f'{adapter.file}: modules_to_save is {adapter.modules_to_save}, but {file} holds no tensor of {(absent or lost)[0]}; '
      'save the adapter again, or correct the list'
    )


def _scale(adapter: Adapter, layout: Layout, key: str, pair: Pair, file: pathlib.Path) -> float:
  """The factor of a pair; ConversionError if the settings are about another rank, or not about this weight."""
  name = peft_name(pair['A'].key).partition('.lora_')[0]
  names = _modules(layout, key)
  if not adapter.targeted((name, *names)):
    raise ConversionError(
      f'{adapter.file}: its target_modules and what narrows them leave out {name}, but {file} adapts it; PEFT would pass it over'
    )
  rank, scale = adapter.rank_and_scale(names, name)
  if len(pair['A'].shape) == 2 and pair['A'].shape[0] != rank:
    raise ConversionError(
      f'{adapter.file}: says rank {rank} for {name}, but {pair["A"].key} in {file} has shape {pair["A"].shape}; the scale depends '
      'on the rank, so one of the two files is not of this adapter'
    )
  return scale


def _check_targets(
  adapter: Adapter,
  base: dict[str, Tensor],
  layout: Layout,
  pairs: dict[str, Pair],
  file: pathlib.Path,
  notes: list[str],
) -> None:
  """ConversionError if the decoder has a weight that should be adapted and is not; a note if the tower has one."""
  if adapter.targets is None:
    return
  left_alone = TIED[:1] if adapter.targets == ALL_LINEAR else ()
  matrices = [k for k, t in base.items() if k.endswith('.weight') and len(t.shape) == 2 and 'embedding' not in k]
  lost = [k for k in matrices if k not in (*pairs, *left_alone) and adapter.targeted(_modules(layout, k))]
  inside = [k for k in lost if k.startswith('model.layers.') or k in TIED]
  if inside:
    raise ConversionError(
      f'{adapter.file}: its target_modules name {inside[0].removesuffix(".weight")}, for which {file} has no pair ({len(inside)} '
      'such weights); is the file whole?'
    )
  if lost:
    notes.append(f'{adapter.file} also targets {len(lost)} weights for which the adapter has no pair, such as {lost[0]}')


def _modules(layout: Layout, key: str) -> tuple[str, ...]:
  return tuple(n.removesuffix('.weight') for n in spellings(layout, key))


def _merged(weight: Tensor, pair: Pair, scale: float, file: pathlib.Path) -> Tensor:
  a, b, lengths = pair['A'], pair['B'], pair.get('M')
  if not len(a.shape) == len(b.shape) == 2 or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
    raise ConversionError(f'{file}: {b.key} {b.shape} times {a.key} {a.shape} does not fit {weight.key} {weight.shape}')
  if lengths and (lengths.shape != weight.shape[:1] or 'lora_embedding' in a.key):
    raise ConversionError(f'{file}: {lengths.key} {lengths.shape} does not fit the rows of {weight.key} {weight.shape}')
  for tensor in pair.values():
    if tensor.dtype not in FLOATS:
      raise ConversionError(f'{file}: {tensor.key} is stored as {tensor.dtype}; only floating point adapters are supported')

  def read() -> np.ndarray:
    parts = {name: tensor.load().astype(np.float32) for name, tensor in pair.items()}
    for name, value in parts.items():
      if not np.isfinite(value).all():
        why = 'holds numbers that are not finite; copy the adapter again, or train it again'
        raise ConversionError(f'{file}: {pair[name].key} {why}')
    merged = parts['B'] @ parts['A']
    merged *= np.float32(scale)
    merged += weight.load()  # in place: several large ones are on their way at a time
    if lengths:
      found = np.linalg.norm(merged, axis=1)
      if not found.all():
        raise ConversionError(f'{file}: a row of {weight.key} with its pair is zero, which {lengths.key} cannot stretch')
      merged *= (parts['M'] / found)[:, None]
    return merged.astype(weight.dtype, copy=False)

  return Tensor(weight.key, weight.shape, weight.dtype, f'{weight.origin} + {file}', read)
