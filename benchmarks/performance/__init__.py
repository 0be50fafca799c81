"""The page of measured times, written from saved results."""
