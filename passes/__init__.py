"""The rewrites, one a file, named by their paper's or field's word."""
