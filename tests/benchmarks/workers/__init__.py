"""The contenders, each in a process of its own: it does what it is asked, and says what that took.

    ours.py     opencode_sync
    rival.py    the asyncio wrapper, by another Python that has it
    bare.py     what a script without any package does

A task has the same name and arguments in all that have it.
"""
