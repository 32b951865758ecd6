"""The command ``opencode-sync``."""
