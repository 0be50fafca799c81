"""Ideas on top of the paper's pipeline that the package has as options, each a method at equal stored bytes."""

from benchmarks.quality.beyond.package import PACKAGE
from benchmarks.quality.beyond.pipeline import stored_method
from benchmarks.quality.beyond.quantised import INT8_FACTORS, Int8FactorsLayer
from benchmarks.study import Method

BEYOND: dict[str, Method] = {
    **PACKAGE,
    "8-bit factors": stored_method(INT8_FACTORS, Int8FactorsLayer),
}
