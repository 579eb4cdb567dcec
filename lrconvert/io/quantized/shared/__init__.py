"""Parts that several methods of storing quantized weights share."""
