"""Ideas on top of the paper's pipeline that the package has as options, each a method at equal stored bytes."""

from benchmarks.quality.beyond.package import PACKAGE
from benchmarks.study import Method

BEYOND: dict[str, Method] = PACKAGE
