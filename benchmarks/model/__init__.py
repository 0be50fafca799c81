"""Whole models, loaded and run each in a process of its own."""
