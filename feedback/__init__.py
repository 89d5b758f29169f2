"""Learning from people: a web page on which people rank, rate and correct answers, and the training rows that are made
from their decisions."""
