"""What the bytes of a recording are: blocks, sections and columns, packed and checked."""
