"""The version of lrconvert, its one place."""

__version__ = "0.1.0"
