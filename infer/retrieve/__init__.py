"""Retrieval: documents to chunks, an index of them by words and by meaning, and the chunks nearest to a question."""
