"""``slimtune serve``: the OpenAI API over one base and its adapters, batched by Transformers' continuous batching.

A request goes through these modules in this order: :mod:`~slimtune.serve.door` (host, key, body),
:mod:`~slimtune.serve.protocol` (what OpenAI's clients may ask), :mod:`~slimtune.serve.api` (the routes),
:mod:`~slimtune.serve.engine` (tokens, in a batch with everybody else's) and :mod:`~slimtune.serve.reply` (text).
"""
