"""Makes a small checkpoint to ship with the repository: weights in bfloat16, one step, checksums, and what it was made by.

    make demo
    python -m examples.ship --src=runs/digits/dynamic/checkpoints --dst=examples/digits --made_by='make demo'

Beside the checkpoint it writes `made.json` (command, commit, digest of the weights) and `SHA256SUMS`, for `sha256sum --check`.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dynllava_jax import checkpoint

MOST = 3_000_000  # bytes


def main() -> None:
  """Writes the checkpoint to a temporary name first."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--src', required=True, help='checkpoint of ours, DIR or DIR/STEP')
  parser.add_argument('--dst', type=pathlib.Path, required=True, help='folder to write; must not exist')
  parser.add_argument('--made_by', required=True, help='command that trained it')
  parser.add_argument('--commit', help='commit of the checkout that trained it; this one if not given')
  args = parser.parse_args()
  if args.dst.exists():
    sys.exit(f'error: --dst={args.dst}: exists already; remove it first')
  _, step = checkpoint.locate(args.src)
  to_bfloat16 = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
  params = jax.tree.map(to_bfloat16, checkpoint.load_params(args.src))
  new = args.dst.with_name(f'.{args.dst.name}.new')
  shutil.rmtree(new, ignore_errors=True)
  new.mkdir(parents=True)
  checkpoint.write_info(new, checkpoint.read_info(args.src), checkpoint.read_tokenizer(args.src))
  ocp.save_checkpointables(new.absolute() / str(step), {'params': params})
  (new / str(step) / 'commit_success.txt').unlink()  # Orbax's own, with the path of this machine; loading does not ask for it
  checkpoint.seal(new / str(step))
  commit = args.commit or subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
  digest = checkpoint.weights_digest(new)
  made = dict(made_by=args.made_by, commit=commit, dtype='bfloat16', step=step, weights_sha256=digest)
  (new / 'made.json').write_text(json.dumps(made, indent=1) + '\n')
  files = sorted(p for p in new.rglob('*') if p.is_file())
  sums = ''.join(f'{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(new)}\n' for p in files)
  (new / 'SHA256SUMS').write_text(sums)
  size = sum(p.stat().st_size for p in new.rglob('*') if p.is_file())
  if size > MOST:
    sys.exit(f'error: {size:,} bytes, at most {MOST:,} are shipped')
  new.rename(args.dst)
  print(f'{args.dst}: {size:,} bytes, {len(files)} files, weights {digest[:12]}')


if __name__ == '__main__':
  main()
