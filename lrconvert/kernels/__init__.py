"""Loops that numba compiles, where they pay; numpy and torch have the same formulas and stand in."""
