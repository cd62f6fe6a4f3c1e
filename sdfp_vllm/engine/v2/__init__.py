"""Drafting on the V2 runner of vLLM."""
