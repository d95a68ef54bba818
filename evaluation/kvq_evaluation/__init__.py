"""How good a quantized cache is."""
