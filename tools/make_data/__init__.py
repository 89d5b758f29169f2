"""Makes instruction data from documents: a model or templates write questions and answers, and filters drop unsuitable
ones."""
