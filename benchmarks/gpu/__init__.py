"""Operators and layers on a GPU, held against what the same run reads, copies and multiplies at best."""
