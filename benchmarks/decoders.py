"""Decoders of Llama's kind by their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """A decoder: widths of its layers and their middle, how many layers and words, and `heads`, of queries and keys."""

    hidden: int
    middle: int
    layers: int
    words: int
    heads: tuple[int, int]
    tied: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer, (out, in) by name."""
        keys = self.hidden * self.heads[1] // self.heads[0]
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.middle, self.hidden),
            "mlp.up_proj": (self.middle, self.hidden),
            "mlp.down_proj": (self.hidden, self.middle),
        }

    @property
    def config(self) -> dict[str, Any]:
        """The fields of transformers' configuration."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.middle,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "vocab_size": self.words,
            "tie_word_embeddings": self.tied,
        }


LLAMA_1B = Decoder(2048, 8192, 16, 128256, (32, 8))
LLAMA_3B = Decoder(3072, 8192, 28, 128256, (24, 8))
LLAMA_8B = Decoder(4096, 14336, 32, 128256, (32, 8))
