"""How packed numbers become attention: Triton kernels and their references."""
