"""The offline job: from a model and text to a plan."""
