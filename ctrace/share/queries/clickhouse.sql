-- What the other queries ask, with ClickHouse: every Parquet file in this folder and below.
CREATE VIEW events AS SELECT * FROM file('**/*.parquet', Parquet);
