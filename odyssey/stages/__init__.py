"""The stages of a cell: each takes the cell, does its work, and writes what it found into the cell's record."""
