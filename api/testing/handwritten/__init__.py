"""Multi-rank programs written by hand, as people write them, with realistic bugs that can be planted: what a checker is for."""
