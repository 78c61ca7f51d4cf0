"""What a memory has learned, in numbers."""
