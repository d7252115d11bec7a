"""Dynamic-LLaVA (arXiv 2412.00876) in JAX/Flax: static shapes, batched, sharded over meshes."""
