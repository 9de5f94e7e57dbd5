"""Adapters that must not be served, and what the gateway must say of each.

    draft.py      a good adapter, and ways to spoil it
    broken.py     what a case is: how it is built, how it is offered, why it is refused
    configs.py, tensors.py, weights.py, files.py    what is wrong with the adapter itself
    places.py, claims.py, changes.py, uploads.py    what is wrong with the way it is offered
    answers.py    what only an engine can tell
    catalogue.py  all of them

An adapter that ever hurt an engine belongs in here.
"""
