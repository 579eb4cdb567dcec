"""Refinement: a short distillation from the original LoRA into a compact adapter."""
