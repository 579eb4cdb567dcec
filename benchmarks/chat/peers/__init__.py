"""What others do with a LoRA at a number of bytes, each written here from its paper.

A peer is charged its numbers only, no header and no names, so that its bytes are a lower bound. Components of all
targets are ranked together where the peer has no rule of its own for a small budget.
"""
