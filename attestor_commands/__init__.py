"""Every command of `attestor` beyond `decrypt`: a file or a folder for each.

They stand on the script `attestor`, which names them in FURTHER_COMMANDS and never imports them
before one is called or listed.
"""
