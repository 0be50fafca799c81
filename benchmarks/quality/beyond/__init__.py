"""Ideas tried on top of the package's default, each a method at equal stored bytes."""

from benchmarks.quality.beyond.clusters import clustered_method
from benchmarks.quality.beyond.gauge import GAUGE_FIXED, GaugeFixedLayer
from benchmarks.quality.beyond.package import PACKAGE
from benchmarks.quality.beyond.pipeline import stored_method
from benchmarks.quality.beyond.quantised import INT8_ALL, INT8_FACTORS, Int8FactorsLayer, Int8Layer
from benchmarks.quality.beyond.refit import RefittedLayer
from benchmarks.quality.beyond.sequential import sequential_method
from benchmarks.quality.beyond.weighted import weighted_method
from benchmarks.quality.package_methods import package_method
from benchmarks.study import Method

BEYOND: dict[str, Method] = {
    **PACKAGE,
    "stored as compressed": stored_method(),
    "sequential": package_method(version=2, sequential=True),
    # So much shrinkage that the targets are the weights themselves: only the Grams are the prefix's.
    "sequential, Grams only": sequential_method(shrinkage=1e9),
    "sequential, gauge-fixed factors": sequential_method(GAUGE_FIXED, GaugeFixedLayer),
    "sequential, refit U": sequential_method(layer_class=RefittedLayer),
    "refit U": stored_method(layer_class=RefittedLayer),
    "gauge-fixed factors": stored_method(GAUGE_FIXED, GaugeFixedLayer),
    "router-weighted Grams": weighted_method("router"),
    "gradient-weighted Grams": weighted_method("gradient"),
    "2 bases, by weights": clustered_method("weights"),
    "2 bases, by whitened distance": clustered_method("whitened"),
    "2 bases, by co-activation": clustered_method("co-activation"),
    "8-bit factors": stored_method(INT8_FACTORS, Int8FactorsLayer),
    "8-bit factors and base": stored_method(INT8_ALL, Int8Layer),
}
