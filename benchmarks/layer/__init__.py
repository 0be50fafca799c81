"""One MoE layer at the true shapes of published models, and the growth of its time with each size."""
