"""From files to proven, packed token ids: sources → conversation → render → documents → packs.

====================  =================================================================================================
module                its one purpose
====================  =================================================================================================
``sources``           the entries of ``data``: their rows in order, samples, weights, hashes
``files``             what a path, folder or pattern means; ``described``: LLaMA-Factory's folders; ``stdin``
``readers``, ``hub``  rows of a file or a hub data set, each with its place
``shapes``            the shapes that published files have, to those that are read; ``rows``: what is said of rows
``blocks``            calls and results that stand among the parts of a content, as messages of their own
``preference``        better and worse replies told apart
``conversation``      every shape of row to one normal form, or the rule that it breaks
``template``          chat templates, bounded in time and size
``tokens``            pieces of text and control tokens to ids; no text becomes a control token
``render``            a conversation to ids and supervised mask; the prompts of every verb
``overlong``          what becomes of a conversation that doesn't fit
``documents``         ids and masks on disk, memory-mapped
``ledger``            the account of every row
``build``             rows through all of the above, by the batch
``preflight``         the proof as a whole, cached by content; what refuses a run
``held_out``          the rows that are evaluated on, split off
``packing``           documents to micro-batches, in an order that (seed, epoch) decides
====================  =================================================================================================

What the other layers call, each from its own module (so that what a name means is told without the libraries that
render)::

    proof = prove(config, tokenizer, formatting_func=None, on_progress=None)   # UserError where training is refused
    proof.train, proof.eval           # Documents, Documents | None
    proof.facts                       # rows, tokens, supervised_tokens, dropped, repaired, noted, lengths, key, …
    proof.save_ledger(run / "ledger.jsonl")

    batches = micro_batches(proof.train, config)       # of packs, or of rows
    batches.per_epoch                 # micro-batches in an epoch
    batches.batch(position)           # a trainer's dict (slimtune.batch); position counts micro-batches over all epochs
    batches.rows(position)            # list[Place]: file:line of what is in it
    batches.dataset(positions)        # datasets.Dataset of one column, for trainers that insist on one …
    batches.collate([{"position": 7}])  # … and the collator that goes with it

    prompt_ids(tokenizer, messages, tools=None)   # what a model is asked with: a prefix of what it was trained on
"""
