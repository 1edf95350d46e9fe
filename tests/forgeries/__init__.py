"""Lies about a bundle, one function each. Every one has to be refused, for the right reason."""
