"""Secrets from a manifest, ciphertexts of every kind, and how the bytes get here; imported by the
commands late.
"""
