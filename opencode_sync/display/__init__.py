"""What people look at: a run as it goes on, and the report page of a batch."""

from .stream import live as live
