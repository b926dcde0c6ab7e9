"""Analysis: facts derived from the dataflow of a Program, never from names or classes."""
