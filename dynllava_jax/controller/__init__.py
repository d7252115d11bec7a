"""How sparse a model is run: by rules with numbers (`rules`), per request while it serves (`ladder`), for a target (`search`)."""
