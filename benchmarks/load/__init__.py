"""Parts of benchmarks.coordinator: what is uploaded, by whom, to whom, and what that costs."""
