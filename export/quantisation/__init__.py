"""Denoisers with parts in 8 bits: which nodes, with which scales, and what that loses on real stages."""
