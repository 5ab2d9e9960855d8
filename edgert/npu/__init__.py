"""NPU: what its compiler takes (`recipe`), the compiler at arm's length (`compiler`, `setup`), its output (`blobs`)."""
