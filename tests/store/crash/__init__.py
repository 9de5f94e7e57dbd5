"""What a crash leaves of the state folder, at every call that changes a file.

layer.cpp        numbers and records those calls in a process, and kills it at a chosen one
child.py         the program that it is loaded into: one run of a script for each crash
script.py        the runs: every method of the registry that writes, files, restarts
disk.py          the folder on a disk that lost what was not synced
verdict.py       what has to hold after a crash: observation.py before, or after, one operation
crash_site.py    brings them together
"""
