"""What `benchmarks/evidence.py` measures on a chat model: tasks, LoRAs, metrics, peers."""
