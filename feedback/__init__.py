"""Learning from people: a page on which they rank, rate and correct answers, and the rows that a model learns from."""
