-- When and where the tables refused: each minute and host with refusals, how many packets, and
-- the service that was refused most. Run it as sources.sql.
WITH services AS (
    SELECT host, date_trunc('minute', time) AS minute, proto, dport, count(*) AS times
    FROM events WHERE kind = 'drop'
    GROUP BY host, date_trunc('minute', time), proto, dport
)
SELECT minute, host, sum(times) AS refused, argMax(proto, times) AS proto,
       argMax(dport, times) AS dport
FROM services GROUP BY minute, host ORDER BY minute, host;
