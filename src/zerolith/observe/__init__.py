"""What a person looks at before reading: the start-up summary, and the numbers of each step."""

from zerolith.observe.logs import Logs as Logs, StepNumbers as StepNumbers
from zerolith.observe.monitors import make_monitors as make_monitors
from zerolith.observe.phases import Phases as Phases
from zerolith.observe.summary import STATES as STATES, Summary as Summary, summarize as summarize
from zerolith.observe.watch import Watch as Watch
