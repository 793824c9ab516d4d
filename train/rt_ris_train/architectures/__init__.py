"""One file per architecture; the file name is the architecture's name."""
