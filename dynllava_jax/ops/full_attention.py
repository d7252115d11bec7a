"""Attention of all to all, as the vision tower has it: by XLA, or by a kernel of jax's that keeps no scores in memory.

Axes: B batch, T tokens, N heads, H head dim.
"""

import jax
import jax.numpy as jnp

FLASH_ROWS = 128  # the TPU kernel takes whole blocks of so many rows
LARGEST_BLOCK = 640  # of rows: scores of a block, 1.6 MB, stay in a TPU's fast memory; LLaVA-1.5's tower is one block


def rows_for(kernel: str, length: int) -> int:
  """Rows that `full_attention` wants for `length` tokens: pad before the projections, where it costs next to nothing."""
  return length + -length % FLASH_ROWS if kernel == 'flash' else length


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, length: int, kernel: str = 'xla') -> jax.Array:
  """Every token sees the first `length` ones.

  Args:
    q, k, v: float[B, T, N, H], T = `rows_for(kernel, length)`.
    length: real tokens.
    kernel: 'xla'; 'flash', the Pallas kernel for TPUs that jax has (jax.experimental.pallas.ops.tpu.flash_attention); 'cudnn', for
      numbers of 16 bits on GPUs, others go to XLA.

  Returns:
    float[B, T, N, H]; rows from `length` on mean nothing.
  """
  if kernel == 'flash':
    return _flash(q, k, v, length)
  cudnn = kernel == 'cudnn' and q.dtype in (jnp.bfloat16, jnp.float16)
  return jax.nn.dot_product_attention(q, k, v, implementation='cudnn' if cudnn else 'xla')


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, length: int) -> jax.Array:
  from jax.experimental.pallas.ops.tpu import flash_attention as flash  # of use on TPUs alone, and slow to import

  batch, rows, _, head_dim = q.shape
  segment = jnp.broadcast_to((jnp.arange(rows) >= length).astype(jnp.int32), (batch, rows))
  size = max(n for n in range(FLASH_ROWS, LARGEST_BLOCK + 1, FLASH_ROWS) if rows % n == 0)
  out = flash.flash_attention(
    *(x.transpose(0, 2, 1, 3) for x in (q, k, v)),
    segment_ids=flash.SegmentIds(segment, segment),
    sm_scale=head_dim**-0.5,
    block_sizes=flash.BlockSizes(block_q=size, block_k_major=size, block_k=size, block_b=1),
  )
  return out.transpose(0, 2, 1, 3)
