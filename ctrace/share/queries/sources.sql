-- Which source fills the tables, over all hosts: entries that it made and was refused,
-- on how many hosts, and for how long its entries stayed (of those that have ended).
--
--   on each host:  ctrace export ctrace.data -o $(hostname).parquet
--   anywhere, in the folder with those files:
--     cat duckdb.sql sources.sql | duckdb
--     cat clickhouse.sql sources.sql | clickhouse local
--
-- Columns: ctrace export --help. An entry's identity is used again, so an end belongs to
-- the last insert before it.
WITH stays AS (
    SELECT made.src AS src, made.dport AS dport,
           sum(date_diff('microsecond', made.time, ended.time)) / 1e6 AS seconds
    FROM (SELECT * FROM events WHERE kind = 'destroy') AS ended
    ASOF JOIN (SELECT * FROM events WHERE kind IN ('insert', 'existing')) AS made
        ON ended.host = made.host AND ended.netns = made.netns AND ended.entry = made.entry
        AND ended.time >= made.time
    GROUP BY made.src, made.dport
),
made AS (
    SELECT src, dport,
           count(DISTINCT host) AS hosts,
           count(*) FILTER (WHERE kind = 'insert') AS entries,
           count(*) FILTER (WHERE kind = 'drop') AS refused
    FROM events WHERE kind IN ('insert', 'drop')
    GROUP BY src, dport
)
SELECT made.src AS src, made.dport AS dport, hosts, entries, refused,
       coalesce(seconds, 0) AS table_seconds
FROM made LEFT JOIN stays ON made.src = stays.src AND made.dport = stays.dport
ORDER BY table_seconds DESC, entries DESC, src, dport LIMIT 20;
