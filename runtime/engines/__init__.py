"""Who owns the ranks: ``sim`` (this process), ``local`` (processes of this machine), ``attach`` (a launcher)."""
