"""What the script `attestor.py` reads, writes and connects to, and the errors it speaks of.

The ground room of the script: together with `nsm` it is all that touches a secret in `decrypt`.
It imports nothing else of this project.
"""
