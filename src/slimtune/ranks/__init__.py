"""Several processes that train one adapter, a GPU each: who they are, how they sum, and how they end together.

A rank is a run of one card that trains its share of each step's micro-batches and sums the gradient with the others.
So everything but the sum is what it is on one card: a process sees only its own card (:func:`take_card`), and no
library beside slimtune is told that there are others (:mod:`slimtune.ranks.group`).
"""
