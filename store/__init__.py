"""What lasts: the state folder, the database, content-addressed files.

A leaf: imported by `engine`, `trainer` and `gateway`, imports none of them.
"""
