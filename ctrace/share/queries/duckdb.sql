-- What the other queries ask, with DuckDB: every Parquet file in this folder and below.
CREATE VIEW events AS SELECT * FROM read_parquet('**/*.parquet', hive_partitioning = false);
