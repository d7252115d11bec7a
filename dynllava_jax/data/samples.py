"""The unit every data source yields, and the error every bad one raises."""

import dataclasses

import numpy as np


class DataError(RuntimeError):
  """A sample that cannot be used; the message names its id, what is wrong and what was expected."""


@dataclasses.dataclass(frozen=True)
class Sample:
  """One conversation in LLaVA's format.

  Attributes:
    id: names the sample in every message about it.
    image: uint8[H, W, 3] RGB, or None.
    conversations: turns `{'from': 'human' | 'gpt', 'value': text}`; `<image>` stands for the image.
    task: name of the question type, for evaluation; '' if there is none.
  """

  id: str
  image: np.ndarray | None
  conversations: tuple[dict[str, str], ...]
  task: str = ''
