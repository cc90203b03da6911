"""The chaos test: every file system call of a command fails once, every signal comes beside each.

    python -m tests.chaos                     everything that `make chaos` runs
    python -m tests.chaos --short             a part of it, the same one every time
    python -m tests.chaos --only RUN          exactly one run, by the name that a violation has
    python -m tests.chaos signals --runs N    whole processes, each with one signal at a random time

A run is one command (a scenario) whose targets lie in one kind of file system (a place), with one
thing that goes wrong (a fault). The command is a black box: what is judged is how it ended, what it
said, and what lies in the folders of its targets. See `judge` for what counts as a violation.

Needs root, or user namespaces, for mount namespaces of its own, and a C compiler for the shim that
makes the calls fail.
"""
