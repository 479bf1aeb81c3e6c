"""The oracle: MPT in PyTorch at any precision, written from the semantics of the family."""
