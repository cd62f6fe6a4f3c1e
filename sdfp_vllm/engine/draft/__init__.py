"""The draft: a view of the loaded target, the same for both of the runners of vLLM."""
