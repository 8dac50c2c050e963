"""Checkpoint folders: read and written as a stream, without a tensor framework."""
