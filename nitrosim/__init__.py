"""What a laptop lacks: a software Nitro Secure Module behind /dev/nsm, and a KMS that honours
attestation documents.

Importing this package opens nothing, starts nothing and loads none of its parts.
"""
