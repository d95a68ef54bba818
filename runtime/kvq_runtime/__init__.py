"""How a transformers model uses a quantized cache."""
