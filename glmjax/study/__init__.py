"""Studies: many runs side by side, and what their weights look like."""
