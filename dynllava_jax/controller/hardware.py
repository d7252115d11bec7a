"""What devices can do, from their makers' data sheets, and how far programs come short of it where that was measured."""

import dataclasses
import itertools
import pathlib
import statistics
from collections.abc import Mapping

from dynllava_jax.config import ConfigError
from dynllava_jax.data.samples import DataError
from dynllava_jax.evals.reading import read_objects
from dynllava_jax.training.throughput import peak_flops

# Bytes per second of a device's memory, by how `device_kind` begins; the makers' data sheets.
BANDWIDTH = {
  'TPU v4': 1228e9,
  'TPU v5 lite': 819e9,
  'TPU v5e': 819e9,
  'TPU v5': 2765e9,
  'TPU v6': 1640e9,
  'NVIDIA A100': 1555e9,
  'NVIDIA H100': 3350e9,
  'NVIDIA H200': 4800e9,
  'NVIDIA L4': 300e9,
}
# By what a target calls a device: its `device_kind`, bytes that a program may use, and watts. GPUs' watts are the makers'
# limits. Of TPUs none is published: v4's is the most that arXiv 2304.01433 reports of a chip, the others are our guesses.
DEVICES = {
  'v4': ('TPU v4', 30.75 * 2**30, 192.0),
  'v5e': ('TPU v5e', 15.75 * 2**30, 200.0),
  'v5p': ('TPU v5', 95.0 * 2**30, 350.0),
  'v6e': ('TPU v6e', 31.24 * 2**30, 300.0),
  'a100': ('NVIDIA A100', 80e9, 400.0),
  'h100': ('NVIDIA H100', 80e9, 700.0),
  'h200': ('NVIDIA H200', 141e9, 700.0),
  'l4': ('NVIDIA L4', 24e9, 72.0),
}
KINDS = {kind: name for name, (kind, *_) in DEVICES.items()} | {'TPU v5 lite': 'v5e', 'TPU v6 lite': 'v6e'}
NO_CALIBRATION = {'prefill': 1.0, 'decode': 1.0, 'uncached': 1.0}


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the hardware can do: FLOP/s, bytes/s, and where these figures are from."""

  flops: float
  bandwidth: float
  source: str

  def seconds(self, flops: float, moved: float) -> float:
    """The least time for so much arithmetic and so many bytes."""
    return max(flops / self.flops, moved / self.bandwidth)


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Devices that a model runs on.

  Attributes:
    name: such as `v5e-8`.
    limits: of one device; chips: how many hold the weights together.
    memory: bytes that a program may use of one device; watts: that it draws at most.
    factors: by part, how many times the least possible seconds a program takes; `source`: how that is known.
  """

  name: str
  limits: Limits
  chips: int = 1
  memory: float = float('inf')
  watts: float = 0.0
  factors: Mapping[str, float] = dataclasses.field(default_factory=lambda: NO_CALIBRATION)
  source: str = 'not calibrated: the least seconds that the hardware allows'

  def seconds(self, part: str, flops: float, moved: float) -> float:
    """Seconds of a program; its work is spread evenly over the chips, what these tell each other is not counted."""
    return self.factors.get(part, 1.0) * self.limits.seconds(flops / self.chips, moved / self.chips)


def name_of(kind: str) -> str | None:
  """What a target calls a device of this `device_kind`; None if no data sheet is known."""
  known = [k for k in KINDS if kind.startswith(k)]
  return KINDS[max(known, key=len)] if known else None


def of_name(name: str) -> Hardware:
  """`v5e`, or `v5e-8` for eight; ConfigError with the known ones."""
  kind, _, chips = name.partition('-')
  if kind not in DEVICES or (chips and not (chips.isdecimal() and int(chips))):
    raise ConfigError(f'--target: device={name}, expected one of {", ".join(DEVICES)}, with -N behind it for N of them')
  found, memory, watts = DEVICES[kind]
  bandwidth = BANDWIDTH[max((k for k in BANDWIDTH if found.startswith(k)), key=len)]
  return Hardware(name, Limits(peak_flops(found), bandwidth, 'data sheet'), int(chips or 1), memory, watts)


def calibrated(hardware: Hardware, bench: pathlib.Path) -> Hardware:
  """By the `bench.json` of `python -m dynllava_jax.bench`: how many times the least seconds each part took.

  Raises:
    ConfigError: it is no such file, or was measured on another device.
  """
  wanted = hardware.name.partition('-')[0]
  known = wanted in DEVICES
  try:
    result = read_objects(bench)
    rows, device, limits = result['rows'], result['machine']['device'], result['machine']['limits']
    factors = {part: [r['seconds'][1] / r['least_seconds'] for r in rows if r['part'] == part] for part in NO_CALIBRATION}
    limits, found = hardware.limits if known else Limits(**limits), name_of(device)
    if not all(f > 0 for f in (limits.flops, limits.bandwidth, *itertools.chain(*factors.values()))):
      raise ValueError('rates and times are above zero')
  except (OSError, DataError, ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
    raise ConfigError(f'--bench={bench}: not what `python -m dynllava_jax.bench` writes; give its bench.json') from None
  if known and found != wanted:
    raise ConfigError(f'--bench={bench}: measured on {device}, and the target is {hardware.name}; leave it out, or measure there')
  medians = {part: statistics.median(f) for part, f in factors.items() if f}
  return dataclasses.replace(
    hardware, limits=limits, factors=NO_CALIBRATION | medians, source=f'calibrated by {bench.name}, measured on {device}'
  )
