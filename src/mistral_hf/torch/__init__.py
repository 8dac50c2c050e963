"""The PyTorch building blocks of the model; this package imports no other."""
