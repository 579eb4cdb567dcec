"""Integers at about their ideal number of bits: 64 fixed models, an interleaved range coder, rows as bytes."""
