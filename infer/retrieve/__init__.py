"""Retrieval: splits documents into chunks, indexes them by words and by vectors, and finds those nearest to a
question."""
