"""Ways in which ranks reach each other's memory; the protocol is in ``transport``."""
