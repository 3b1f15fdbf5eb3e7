"""The meaning of ATen ops over the ring, one file a family; ``table`` joins them."""
