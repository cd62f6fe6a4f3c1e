"""All contact with vLLM: registration, configuration, patches, refusals.

`register` is the `vllm.general_plugins` entry point. vLLM calls it in every process, most of
which never draft, so it only teaches vLLM's argument handling the word "sdfp". Everything
else is patched in by `SdfpConfig` when one is built or unpickled (see `config.py`): where
the configuration goes, Ray workers included, the patches go with it.
"""


def register() -> None:
    """Makes `--speculative-model sdfp` and `speculative_config={"method": "sdfp"}` known. Idempotent."""
    from sdfp_vllm.engine.arguments import patch_arguments

    patch_arguments()
