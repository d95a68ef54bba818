"""Other ways to quantize a cache, one method a file.

A method is a small frozen dataclass with the fields and functions of
``kvq_runtime.evaluation_rule.CacheCodec``, and ``effective_bits(num_kv_heads, head_dim)`` counted
from the bytes that it would allocate. A newcomer adds one by copying a file.
"""
