"""The quality laboratory: methods compared at equal stored bytes, their results kept as JSON lines, and a page made of them."""
