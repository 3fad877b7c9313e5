"""What every part of Millrace shares: words, shapes, settings, errors, and the command line."""

__version__ = "0.1.0"
