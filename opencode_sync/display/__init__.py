"""What people look at: a stream as it comes, and the report page of a batch."""

from .stream import live as live
