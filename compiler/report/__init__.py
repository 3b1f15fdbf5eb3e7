"""What hocket tells people: tables for a terminal, rows for machines."""
