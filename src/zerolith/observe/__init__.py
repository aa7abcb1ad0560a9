"""What a person looks at before reading: the start-up summary, and the numbers of each step."""

from zerolith.observe.breakdown import Breakdown as Breakdown
from zerolith.observe.monitors import make_monitors as make_monitors
from zerolith.observe.summary import Summary as Summary, summarize as summarize
from zerolith.observe.watch import Watch as Watch
