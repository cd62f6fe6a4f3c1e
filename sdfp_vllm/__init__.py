"""Self-speculative decoding for vLLM by dropping the layers that matter least.

Importing this package imports neither torch nor vLLM: vLLM loads the plugin in every
process, and a plugin must cost nothing where it is not used.
"""

__version__ = "0.1.0"
