"""Batch inference on Ray: a .jsonl file of prompts in, a .jsonl file of answers out."""
