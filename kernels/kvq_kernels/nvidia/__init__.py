"""The fast path of decoding for NVIDIA GPUs, in Gluon: layouts are said, not guessed."""
