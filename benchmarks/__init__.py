"""Benchmarks and quality studies; run from a checkout."""
