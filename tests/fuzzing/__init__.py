"""The kinds of bad input: a module each, whose `cases(rng, n)` gives n pairs of a description and a callable.

The callable reads one bad input. It returns where the input is accepted and raises an MllmError where it is refused;
whatever else it raises is a fault of the library.
"""
