"""Device mesh and the rules that map logical axis names to mesh axes.

Models name their axes ('embed', 'heads', ...); only this file knows what they mean on a mesh:
`data`, `fsdp` and `expert` split the batch, `fsdp` splits the width of every weight, `tensor` splits heads, mlp and
vocabulary, `expert` the experts of a layer.
"""

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dynllava_jax.config import ConfigError, MeshConfig

BATCH = ('data', 'fsdp', 'expert')
RULES = (
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('layers', None),
  ('head_dim', None),
)


def rules(mesh: Mesh) -> tuple[tuple[str, str | tuple[str, ...] | None], ...]:
  """Logical axis names and what they mean on this mesh; only meshes that split experts have the axis `expert`."""
  return (('batch', batch_axes(mesh)), ('expert', 'expert' if 'expert' in mesh.shape else None), *RULES)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
  """The axes of the mesh that split the rows of a batch."""
  return tuple(axis for axis in BATCH if axis in mesh.shape)


def batch_ways(sizes: Mapping[str, int]) -> int:
  """Parts that the rows of a batch are split into, on a mesh with axes of these sizes."""
  return math.prod(sizes.get(axis, 1) for axis in BATCH)


def mesh_sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
  """Devices along each axis.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, or `data` not over the slices.
  """
  sizes = {'data': cfg.data, 'fsdp': cfg.fsdp, 'tensor': cfg.tensor} | ({'expert': cfg.expert} if cfg.expert != 1 else {})
  free = [k for k, v in sizes.items() if v == -1]
  fixed = math.prod(v for v in sizes.values() if v != -1)
  if len(free) > 1 or any(v < 1 for v in sizes.values() if v != -1) or devices % fixed or (not free and fixed != devices):
    raise ConfigError(
      f'config.mesh: {sizes} does not fit {devices} devices; the sizes must multiply to {devices}, and one of them may be -1'
    )
  if free:
    sizes[free[0]] = devices // fixed
  if sizes['data'] % cfg.slices:
    raise ConfigError(f'config.mesh: data is {sizes["data"]}, expected a multiple of slices, {cfg.slices}: data goes over them')
  return sizes


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over all devices, or over those given; ConfigError as for `mesh_sizes`, or if there are other slices."""
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(cfg, len(devices))
  types = (AxisType.Auto,) * len(sizes)
  of_tpus = {d.slice_index for d in devices if d.platform == 'tpu' and hasattr(d, 'slice_index')}
  if of_tpus and len(of_tpus) != cfg.slices:
    raise ConfigError(f'config.mesh.slices: {cfg.slices}, but the devices are of {len(of_tpus)}; set it to {len(of_tpus)}')
  if cfg.slices == 1:
    try:
      return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)
    except NotImplementedError:  # no axis, or product of axes, of the torus is as long as an axis of the mesh
      array = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
      return Mesh(array, tuple(sizes), axis_types=types)
  inner = (sizes['data'] // cfg.slices, *(n for axis, n in sizes.items() if axis != 'data'))
  try:  # without TPU slices, those are the processes
    array = mesh_utils.create_hybrid_device_mesh(
      inner, (cfg.slices, *[1] * (len(inner) - 1)), devices, process_is_granule=not of_tpus, allow_split_physical_axes=True
    )
  except ValueError as e:
    raise ConfigError(f'config.mesh.slices: {cfg.slices} is not how these devices are joined ({e})') from None
  return Mesh(array, tuple(sizes), axis_types=types)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Raises ConfigError unless the global batch divides over the mesh, and each device's rows into `accumulate` parts."""
  ways = batch_ways(mesh.shape)
  if batch_size % ways == 0 and batch_size % (ways * accumulate):
    raise ConfigError(
      f'config.accumulate: {accumulate} does not divide the {batch_size // ways} rows that each of {ways} devices has of '
      f'a batch of {batch_size}; choose a divisor of {batch_size // ways}'
    )
  if batch_size % ways:
    axes = ' x '.join(batch_axes(mesh))
    raise ConfigError(f'config.batch_size: {batch_size} does not divide over {axes} = {ways} devices; use a multiple of {ways}')


def batch_hosts(mesh: Mesh) -> tuple[int, int]:
  """How many parts of a batch the processes hold between them, and which of them is this process's.

  Processes that share a part, as `tensor` runs over them, must be fed the same rows. A part need not be contiguous.

  Raises:
    ConfigError: processes share some of their rows but not all.
  """
  ways = batch_ways(mesh.shape)
  held = collections.defaultdict(set)
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
    held[device.process_index].add(rows.start or 0)
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != ways:
    raise ConfigError(
      f"config.mesh: {dict(mesh.shape)} gives some of the {len(held)} hosts a part of another one's rows; choose data, fsdp and "
      'tensor such that each host, or each group of hosts, holds rows of its own'
    )
  return len(parts), parts.index(tuple(sorted(held[jax.process_index()])))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the first axis of every array of a batch."""
  return NamedSharding(mesh, PartitionSpec(batch_axes(mesh)))


def split_rows(tree: Any, parts: int, mesh: Mesh) -> Any:
  """Arrays [B, ...] as [parts, B / parts, ...]: every device splits the rows that it has, none go elsewhere."""
  ways = batch_ways(mesh.shape)
  place = NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh)))

  def split(x):
    x = x.reshape(ways, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x.reshape(parts, -1, *x.shape[3:]), place)

  return jax.tree.map(split, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, PartitionSpec())


def shardings(boxed: Any, mesh: Mesh) -> Any:
  """Shardings for a tree of (abstract) parameters that still carries its logical axis names.

  An axis that its mesh axis does not divide stays whole: tiny models run on any mesh.
  """
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules(mesh))

  def fit(spec, leaf):
    def whole(size, axis):
      ways = math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ()))
      return axis if size % ways == 0 else None

    return NamedSharding(mesh, PartitionSpec(*(whole(s, a) for s, a in zip(leaf.shape, spec))))

  return jax.tree.map(fit, specs, unboxed(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))


def unboxed(params: Any) -> Any:
  """The tree without its axis names: plain nested dicts of arrays or shapes.

  Not `nn.meta.unbox`, which inside `on_mesh` would also constrain each array, shapes included.
  """
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(lambda x: x.value if is_box(x) else x, params, is_leaf=is_box)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
  """Inside, logical axis names in models mean this mesh's axes."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules(mesh)):
    yield
