"""A fine-tuned model minus its base, as a LoRA: what differs, its best factors, and what is carried as it is."""
