"""Checks that are run from a checkout; not installed."""
