"""What a release consists of, and what is checked before it is one; nothing here is installed."""
