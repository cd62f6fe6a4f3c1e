"""Runs engines in turns, each in a process of its own, and compares their speed and their answers."""
