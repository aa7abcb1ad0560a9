"""What a person looks at before reading: the start-up summary."""

from zerolith.observe.summary import Summary as Summary, summarize as summarize
