"""Several adapters of one base as one: the sum of their updates, and what PEFT's `add_weighted_adapter` makes."""
