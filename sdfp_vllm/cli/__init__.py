"""The `sdfp` command: a file for each of its commands."""
