"""Quantized weights as checkpoints hold them: one file a method, named as `quantization_config` names it."""
