"""What Engraphy asks of the operating system: files that appear whole, free memory, signals."""
