"""Processes: identity and liveness, memory and processor use, stacks, termination, and what launched them."""
