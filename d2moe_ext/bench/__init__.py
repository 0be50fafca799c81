"""What one MoE layer's forward costs: measured, and held against what the machine could do at best."""
