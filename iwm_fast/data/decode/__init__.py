"""From the bytes of a file to pixels: what it is, whether it is whole, which way is up, which levels it has."""
