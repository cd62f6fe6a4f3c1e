"""Ray: serving replicas and batch inference."""
