"""Makes instruction data from documents: questions and answers by a model or templates, filtered and decontaminated."""
