"""Every symbol of vLLM that this package uses, looked up in one place, and the releases that have them."""
