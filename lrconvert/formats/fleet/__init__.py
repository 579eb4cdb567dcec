"""A fleet: many adapters in one folder, in which what they have in common lies once.

Normative text: ``formats/fleet-v1.md``. `head` is the file that says what the others hold, `index` finds records by
their keys, `records` are what is stored, `manifests` what a member states of its own; `opened` reads, `intake` decides
what is shared, `writing` changes a fleet, `checking` finds every damage.
"""
