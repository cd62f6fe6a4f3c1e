"""Everything that runs on Ray: clusters, serving, offline batches."""
