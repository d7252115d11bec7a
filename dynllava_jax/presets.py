"""Model sizes: the published LLaVA-1.5 ones, and tiny ones for tests.

Sizes of the published models are those of their `config.json` files (liuhaotian/llava-v1.5-7b and -13b,
openai/clip-vit-large-patch14-336).
"""

from dynllava_jax.config import LlamaConfig, ModelConfig, PredictorConfig, TokenPackerConfig, VisionConfig

CLIP_L14_336 = VisionConfig()

LLAVA_1_5_7B = ModelConfig(vision=CLIP_L14_336, llama=LlamaConfig())
LLAVA_1_5_13B = ModelConfig(
  vision=CLIP_L14_336, llama=LlamaConfig(hidden_size=5120, mlp_dim=13824, num_layers=40, num_heads=40, num_kv_heads=40)
)

DYNAMIC_LLAVA_7B = ModelConfig(vision=CLIP_L14_336, llama=LLAVA_1_5_7B.llama, predictor=PredictorConfig())
DYNAMIC_LLAVA_13B = ModelConfig(vision=CLIP_L14_336, llama=LLAVA_1_5_13B.llama, predictor=PredictorConfig())

# TokenPacker (arXiv 2407.02392) as published, two by two patches in an image token: 144 of them.
TOKENPACKER = dict(projector='tokenpacker', packer=TokenPackerConfig())
TOKENPACKER_7B = ModelConfig(vision=CLIP_L14_336, llama=LLAVA_1_5_7B.llama, **TOKENPACKER)
TOKENPACKER_13B = ModelConfig(vision=CLIP_L14_336, llama=LLAVA_1_5_13B.llama, **TOKENPACKER)
DYNAMIC_TOKENPACKER_7B = ModelConfig(vision=CLIP_L14_336, llama=LLAVA_1_5_7B.llama, predictor=PredictorConfig(), **TOKENPACKER)
DYNAMIC_TOKENPACKER_13B = ModelConfig(vision=CLIP_L14_336, llama=LLAVA_1_5_13B.llama, predictor=PredictorConfig(), **TOKENPACKER)

TINY = ModelConfig(
  vision=VisionConfig(image_size=56, hidden_size=32, mlp_dim=64, num_layers=3, num_heads=4),
  llama=LlamaConfig(vocab_size=96, hidden_size=64, mlp_dim=96, num_layers=4, num_heads=4, num_kv_heads=2),
  predictor=PredictorConfig(d_model=32, num_heads=4, num_layers=2, mlp_dim=64),
)
