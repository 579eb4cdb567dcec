"""Many adapters at once: `sources` finds them and names their outputs, `request` says what makes an output finished,
`pool` runs processes, `worker` is one of them, `run` is the verbs."""

from __future__ import annotations
