"""The unit every data source yields, and the error every bad one raises."""

import dataclasses

import numpy as np
from PIL import Image

# Why a sample cannot be used; reports count by these names.
REASONS = {
  'malformed': 'not a sample in LLaVA format',
  'wrong_roles': 'turns do not alternate between human and gpt',
  'empty_question': 'a question without text',
  'empty_answer': 'an answer without text',
  'separator_in_text': "a text that holds the template's or the tokenizer's separators",
  'no_supervised_token': 'nothing to train on',
  'too_long': 'longer than the largest bucket',
  'image_without_placeholder': 'an image, but no <image> in the text',
  'placeholder_without_image': '<image> in the text, but no image',
  'placeholder_in_answer': '<image> in an answer',
  'several_images': 'more than one image',
  'missing_image': 'the image file does not exist',
  'undecodable_image': 'the image file cannot be read as a picture',
  'other_content': 'video, audio or other content that the model does not take',
  'outside_image': 'the image file lies outside of the folder of images',
}


class DataError(RuntimeError):
  """A sample that cannot be used; the message names its id, what is wrong and what was expected.

  Attributes:
    reason: a key of `REASONS`.
  """

  def __init__(self, message: str, reason: str = 'malformed'):
    if reason not in REASONS:
      raise ValueError(f'{reason!r} is no reason; expected one of {", ".join(REASONS)}')
    super().__init__(message, reason)  # both are arguments, so that it survives pickling
    self.reason = reason

  def __str__(self) -> str:
    return self.args[0]


@dataclasses.dataclass(frozen=True)
class Sample:
  """One conversation in LLaVA's format.

  Attributes:
    id: names the sample in every message about it.
    image: RGB, as uint8[H, W, 3] or a Pillow image, or None.
    conversations: turns `{'from': 'human' | 'gpt', 'value': text}`; `<image>` stands for the image.
    task: name of the question type, for evaluation; '' if there is none.
  """

  id: str
  image: np.ndarray | Image.Image | None
  conversations: tuple[dict[str, str], ...]
  task: str = ''
