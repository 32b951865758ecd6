"""Many jobs on threads, or on other processes; knows nothing of OpenCode."""
