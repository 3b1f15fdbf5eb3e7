"""From an ordinary module or function to a Program."""
