"""Converts a PyTorch LLaVA or Dynamic-LLaVA checkpoint (the authors' layout) to ours.

    python convert_weights.py --src=llava-v1.5-7b --vision=clip-vit-large-patch14-336 --dst=checkpoints/llava-7b
    python convert_weights.py --src=DIR --dst=DIR --verify=case.npz

With --verify a recorded case is recomputed with the converted weights; exit status 1 unless every quantity agrees.
"""

import pathlib
import sys

from absl import flags

from dynllava_jax import command_line

SRC = flags.DEFINE_string('src', None, 'Directory with config.json and .bin or safetensors shards.', required=True)
DST = flags.DEFINE_string('dst', None, 'Directory for the checkpoint; must be new or empty.', required=True)
VISION = flags.DEFINE_string('vision', None, "CLIP directory; the config's mm_vision_tower if not given.")
VERIFY = flags.DEFINE_string('verify', None, 'Recorded case (.npz) to recompute with the converted weights.')


def main(_) -> None:
  with command_line.readable_errors():
    from dynllava_jax.convert import report

    passed = report.run(pathlib.Path(SRC.value), pathlib.Path(DST.value), VISION.value, VERIFY.value)
  sys.exit(0 if passed else 1)


if __name__ == '__main__':
  command_line.run(main)
