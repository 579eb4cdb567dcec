"""The parts of `benchmarks/evidence.py`, measured on a chat model: tasks, LoRAs, metrics, peers."""
