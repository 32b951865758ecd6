"""Operating-system processes, and ``opencode run`` as one."""
