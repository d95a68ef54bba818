"""What a quantized cache is: configuration, codec, packed pages, sidecar files."""
