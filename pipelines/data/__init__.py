"""Images, tables and where they are kept: sources, benchmarks, schemas, storage."""
