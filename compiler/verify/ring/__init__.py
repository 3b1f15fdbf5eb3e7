"""The finite exponential ring: programs are evaluated exactly and compared with ``==``."""
