"""Rankings of channels: a score per channel, and whether channels compete within their module or with all others."""
