"""Tasks for ``d2moe eval --tasks`` that need no network."""
