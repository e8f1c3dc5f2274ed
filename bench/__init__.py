"""Side-by-side measurements. They are no tests: nothing here passes or fails."""
