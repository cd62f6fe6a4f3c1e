"""Drafting on the V1 runner of vLLM."""
