"""Pruning as functions of tensors: N:M patterns, layer choice, MACs, spectra and the solver; no disk."""
