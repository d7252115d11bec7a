"""Machines that a run is planned or compiled for, named as `v5e:16x16`, `h100:8` or `cpu:8`: their chips' published figures.

Imports no jax: what is set here must be set before jax starts.
"""

import dataclasses
import math
import os
import re

from dynllava_jax.config import ConfigError

GIB = 2**30
NAME = re.compile(r'([a-z0-9][a-z0-9-]*):([0-9]{1,6}(?:x[0-9]{1,6})*)')
GPU_SHARE = 'XLA_PYTHON_CLIENT_MEM_FRACTION'  # environment variable: of a GPU's memory, what jax takes


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of jax.

  Attributes:
    kind: its `device_kind`, by which `throughput.peak_flops` knows it; '' if it is not known.
    memory: bytes that programs may use: of a TPU what its compiler allows; 0 if not known.
    clock: Hz, for the compiler's cycles; 0 for what has no such compiler.
    links: bytes/s that a chip sends to others of its slice or machine, all links together, as published; 0 if not known.
  """

  kind: str = ''
  memory: float = 0
  clock: float = 0
  links: float = 0


# Links: Google's pages of system architecture (ICI bandwidth per chip: v4 2,400 Gbit/s, v5e 1,600, v5p 4,800, v6e 3,584);
# the clock is that at which the matrix units give the published peak. NVLink: the makers' data sheets, one direction.
TPUS = {
  'v4': Chip('TPU v4', 30.75 * GIB, 1.05e9, 300e9),
  'v5e': Chip('TPU v5e', 15.75 * GIB, 1.5e9, 200e9),
  'v5p': Chip('TPU v5', 95.0 * GIB, 1.75e9, 600e9),
  'v6e': Chip('TPU v6e', 31.24 * GIB, 1.75e9, 448e9),
}
GPUS = {
  'a100-40gb': Chip('NVIDIA A100', 40e9, links=300e9),
  'a100': Chip('NVIDIA A100', 80e9, links=300e9),
  'h100': Chip('NVIDIA H100', 80e9, links=450e9),
  'h200': Chip('NVIDIA H200', 141e9, links=450e9),
  'l4': Chip('NVIDIA L4', 24e9),
  'rtx3090': Chip('NVIDIA GeForce RTX 3090', 24e9),
  'rtx4090': Chip('NVIDIA GeForce RTX 4090', 24e9),
}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices of one kind, joined by their own network: a TPU slice, a machine with GPUs, or processors.

  Attributes:
    name: as it was written.
    family: `v5e`, `h100`, `cpu`.
    topology: `16x16` of a TPU; the number of devices of anything else.
    chip: what is known of a device.
  """

  name: str
  family: str
  topology: str
  chip: Chip

  @property
  def devices(self) -> int:
    """How many there are."""
    return math.prod(int(n) for n in self.topology.split('x'))

  @property
  def is_tpu(self) -> bool:
    """Whether the TPU compiler knows it."""
    return self.family not in GPUS and self.family != 'cpu'


def read(text: str, flag: str) -> Machine:
  """The machine that `flag` gives; ConfigError if it is not written as one."""
  known = f'{", ".join(TPUS)} with a topology (v5e:16x16, v5p:4x4x4), {", ".join(GPUS)} or cpu with a number (h100:8)'
  found = NAME.fullmatch(text)
  if not found:
    raise ConfigError(f'{flag}: {text!r} is no machine; expected one of {known}')
  family, topology = found.groups()
  if family == 'cpu':
    chip = Chip()
  elif family in GPUS:
    chip = GPUS[family]
    chip = dataclasses.replace(chip, memory=chip.memory * float(os.environ.get(GPU_SHARE, 0.75)))
  else:
    chip = TPUS.get(family, Chip())  # the compiler may know more than this table
  machine = Machine(text, family, topology, chip)
  if machine.is_tpu and 'x' not in topology:
    raise ConfigError(f'{flag}: {text!r}: expected the topology of a TPU slice, such as 16x16; known are {known}')
  if not machine.is_tpu and 'x' in topology:
    raise ConfigError(f'{flag}: {text!r}: expected a number of devices; known are {known}')
  if not 0 < machine.devices <= 2**16:
    raise ConfigError(f'{flag}: {text!r} has {machine.devices:,} devices, expected 1 to 65,536')
  return machine


def pretend(machine: Machine) -> None:
  """Sets what jax reads at its start, so that this process compiles for the machine and runs on the CPU alone."""
  devices = 1 if machine.is_tpu else machine.devices
  more = f'--xla_force_host_platform_device_count={devices}'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {more}'.strip()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # what is read is what the compiler writes while it compiles
  # The compiler looks for TPUs, for its lock and for a cloud's description of this machine: there is none.
  os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  os.environ |= {'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
