"""MPT in TVM Relax: model, weight mapper, compilation and runtime."""
