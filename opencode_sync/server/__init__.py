"""A warm ``opencode serve``."""
