"""slimtune: fine-tune a chat model in 4 bits on one's own GPU.

Importing this package imports no torch and changes nothing outside it.
"""

__version__ = "0.1.0"
