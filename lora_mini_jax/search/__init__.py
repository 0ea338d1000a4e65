"""Which kernels are worth adapting: DiffoRA's search, and the choice after it."""
