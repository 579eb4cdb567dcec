"""The bundled pair: a tiny decoder and a LoRA trained on it with PEFT, both made by ``fixtures/make.py``."""
