"""The kinds of bad input: one module each, whose `cases(rng, n)` yields n pairs of a description and a callable.

The callable reads one bad input. It returns if the input is accepted and raises an MllmError if it is refused. Any
other exception is a fault of the library.
"""
