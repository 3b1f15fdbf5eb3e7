"""Three doors, one hall: ``parallelize``, the decorator and the ``torch.compile`` backend end in the same session."""
