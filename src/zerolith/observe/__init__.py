"""What a person looks at before reading: the start-up summary."""

from zerolith.observe.summary import Summary, summarize

__all__ = ["Summary", "summarize"]
