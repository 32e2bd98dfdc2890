"""The work that needs torch, in a process of its own."""
