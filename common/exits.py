"""Exit codes of all commands. Python itself exits with code 1 after a traceback. Code 128 + N means that signal N ended
the process."""

DONE = 0
INPUT = 2  # bad input: a UserError
BROKEN = 70  # EX_SOFTWARE: the loss or the gradients are not finite
BELOW_FLOOR = 71  # a metric crossed one of the limits in config.floors
PREEMPTED = 75  # EX_TEMPFAIL: interrupted; the same command resumes the run
INTERRUPTED = 130  # stopped by Ctrl-C; there is nothing to resume
