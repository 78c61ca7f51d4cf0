"""What a memory has learned and what it is worth: probes of a model, and the pages that show them."""
