"""Ideas that did not help, or less than an option that stayed, and whose code is gone: their rows stay in the results.

They were measured on 2026-11-25 on the default as it was then, *former default*: factors stored whole, and base sparsities
told apart by 6 % of predicted error. The history of this folder before that day's end holds their code.
"""

from __future__ import annotations

FORMER_DEFAULT = "former default"

# By name, with the version of the code that measured them.
RETIRED: dict[str, int] = {
    FORMER_DEFAULT: 1,
    "stored as compressed": 1,
    "refit U": 1,
    "router-weighted Grams": 1,
    "gradient-weighted Grams": 1,
    "2 bases, by whitened distance": 1,
    "2 bases, by co-activation": 1,
    "sequential, prefix routing": 1,
    "sequential, Grams only": 1,
    "sequential, refit U": 1,
    "8-bit factors and base": 1,
}
