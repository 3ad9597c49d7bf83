"""The sides of ``truetune bench training``: a script each, which the Python of its own environment runs.

They import the standard library, numpy, torch and what they measure; none but ``ours`` knows truetune.
"""
