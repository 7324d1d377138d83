"""The choice of implementation and block sizes for each matmul."""
