-- Which source fills the tables, over all hosts: entries that it made and was refused,
-- on how many hosts, and for how long its entries stayed (of those that have ended).
--
--   on each host:  ctrace export ctrace.data -o $(hostname).parquet
--   anywhere:      duckdb < sources.sql        in the folder with those files
--
-- Columns: ctrace export --help. An entry's identity is used again, so an end belongs to
-- the last insert before it.
WITH events AS (FROM read_parquet('*.parquet')),
stays AS (
    SELECT made.src, made.dport, sum(epoch_ns(ended.time) - epoch_ns(made.time)) / 1e9 AS seconds
    FROM (FROM events WHERE kind = 'destroy') AS ended
    ASOF JOIN (FROM events WHERE kind IN ('insert', 'existing')) AS made
        ON ended.host = made.host AND ended.netns = made.netns AND ended.entry = made.entry
        AND ended.time >= made.time
    GROUP BY ALL
),
made AS (
    SELECT src, dport,
           count(DISTINCT host) AS hosts,
           count(*) FILTER (kind = 'insert') AS entries,
           count(*) FILTER (kind = 'drop') AS refused
    FROM events WHERE kind IN ('insert', 'drop')
    GROUP BY ALL
)
SELECT src, dport, hosts, entries, refused, coalesce(seconds, 0) AS table_seconds
FROM made LEFT JOIN stays USING (src, dport)
ORDER BY table_seconds DESC, entries DESC, src, dport LIMIT 20;
