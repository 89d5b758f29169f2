"""Exit codes of every command. Python itself exits with 1 after a traceback; 128 + N stands for signal N."""

DONE = 0
INPUT = 2  # bad input: a UserError
BROKEN = 70  # EX_SOFTWARE: loss or gradients are not finite
BELOW_FLOOR = 71  # a metric crossed one of config.floors
PREEMPTED = 75  # EX_TEMPFAIL: interrupted, run the same command again
INTERRUPTED = 130  # Ctrl-C, with nothing to resume
