"""What users hold: the verbs, the two runners, sessions, permissions."""
