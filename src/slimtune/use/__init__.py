"""After training: chat, evaluate, compare, merge, export, serve."""
