CREATE INDEX IF NOT EXISTS "{chat}_updated_at" ON "{chat}" ("updated_at");

CREATE INDEX IF NOT EXISTS "{request}_turn_id" ON "{request}" ("turn_id");

DROP VIEW IF EXISTS "{stem}_usage_daily";

CREATE VIEW "{stem}_usage_daily" AS
SELECT
    substr(created_at, 1, 10) AS day,
    provider,
    model,
    source,
    COUNT(*) AS requests,
    SUM(CASE WHEN error IS NULL THEN 0 ELSE 1 END) AS failed_requests,
    SUM(CASE WHEN attempt > 1 THEN 1 ELSE 0 END) AS retried_requests,
    SUM(input_tokens) AS input_tokens,
    SUM(output_tokens) AS output_tokens,
    SUM(cached_tokens) AS cached_tokens,
    SUM(cache_write_tokens) AS cache_write_tokens,
    SUM(thinking_tokens) AS thinking_tokens,
    COALESCE(SUM(CAST(ROUND(cost * 1000000000000) AS INTEGER)), 0) / 1000000000000.0 AS cost,
    SUM(CASE WHEN cost IS NULL THEN 1 ELSE 0 END) AS unpriced_requests,
    SUM(duration_ms) AS duration_ms,
    MAX(duration_ms) AS duration_max_ms
FROM "{request}"
GROUP BY 1, 2, 3, 4;

DROP VIEW IF EXISTS "{stem}_usage_hourly";

CREATE VIEW "{stem}_usage_hourly" AS
SELECT
    substr(created_at, 1, 13) || ':00:00+00:00' AS hour,
    provider,
    model,
    source,
    COUNT(*) AS requests,
    SUM(CASE WHEN error IS NULL THEN 0 ELSE 1 END) AS failed_requests,
    SUM(CASE WHEN attempt > 1 THEN 1 ELSE 0 END) AS retried_requests,
    SUM(input_tokens) AS input_tokens,
    SUM(output_tokens) AS output_tokens,
    SUM(cached_tokens) AS cached_tokens,
    SUM(cache_write_tokens) AS cache_write_tokens,
    SUM(thinking_tokens) AS thinking_tokens,
    COALESCE(SUM(CAST(ROUND(cost * 1000000000000) AS INTEGER)), 0) / 1000000000000.0 AS cost,
    SUM(CASE WHEN cost IS NULL THEN 1 ELSE 0 END) AS unpriced_requests,
    SUM(duration_ms) AS duration_ms,
    MAX(duration_ms) AS duration_max_ms
FROM "{request}"
GROUP BY 1, 2, 3, 4;

DROP VIEW IF EXISTS "{stem}_request_detail";

CREATE VIEW "{stem}_request_detail" AS
SELECT
    request.id,
    request.created_at,
    request.chat_id,
    request.message_id,
    request.turn_id,
    request.source,
    request.round,
    request.attempt,
    request.provider,
    request.model,
    request.status_code,
    request.error,
    request.finish_reason,
    request.duration_ms,
    request.first_token_ms,
    request.streamed,
    request.input_tokens,
    request.output_tokens,
    request.cached_tokens,
    request.cache_write_tokens,
    request.thinking_tokens,
    request.usage_estimated,
    request.cost,
    request.correction_rounds,
    request.input_tokens + request.output_tokens AS total_tokens,
    session.agent_class,
    request.error IS NOT NULL AS is_failed,
    request.attempt > 1 AS is_retry,
    request.cost IS NULL AS is_unpriced
FROM "{request}" AS request
LEFT JOIN "{agent_session}" AS session ON session.chat_id = request.chat_id;

DROP VIEW IF EXISTS "{stem}_tool_usage_daily";

CREATE VIEW "{stem}_tool_usage_daily" AS
SELECT
    substr(created_at, 1, 10) AS day,
    name,
    COUNT(*) AS calls,
    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,
    AVG(duration_ms) AS duration_avg_ms,
    MAX(duration_ms) AS duration_max_ms
FROM "{tool_call}"
GROUP BY 1, 2;

DROP VIEW IF EXISTS "{stem}_chat_cost";

CREATE VIEW "{stem}_chat_cost" AS
SELECT
    chat_id,
    COUNT(DISTINCT turn_id) AS turns,
    COUNT(*) AS requests,
    SUM(CASE WHEN error IS NULL THEN 0 ELSE 1 END) AS failed_requests,
    SUM(CASE WHEN attempt > 1 THEN 1 ELSE 0 END) AS retried_requests,
    SUM(input_tokens) AS input_tokens,
    SUM(output_tokens) AS output_tokens,
    SUM(cached_tokens) AS cached_tokens,
    SUM(cache_write_tokens) AS cache_write_tokens,
    SUM(thinking_tokens) AS thinking_tokens,
    COALESCE(SUM(CAST(ROUND(cost * 1000000000000) AS INTEGER)), 0) / 1000000000000.0 AS cost,
    SUM(CASE WHEN cost IS NULL THEN 1 ELSE 0 END) AS unpriced_requests,
    SUM(duration_ms) AS duration_ms,
    MAX(duration_ms) AS duration_max_ms,
    MIN(created_at) AS first_request_at,
    MAX(created_at) AS last_request_at
FROM "{request}"
GROUP BY chat_id;

CREATE VIRTUAL TABLE IF NOT EXISTS "{stem}_search" USING fts5(words, content = '', tokenize = 'unicode61 remove_diacritics 0');

CREATE TABLE IF NOT EXISTS "{stem}_search_row" (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    row_id TEXT NOT NULL,
    UNIQUE (row_id, kind)
);

DROP TRIGGER IF EXISTS "{message}_search_insert";

CREATE TRIGGER "{message}_search_insert" AFTER INSERT ON "{message}" WHEN NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT OR REPLACE INTO "{stem}_search_row" (kind, row_id) SELECT 'message', NEW.id WHERE NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
    INSERT INTO "{stem}_search" (rowid, words) SELECT id, substr(NEW.content, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = NEW.id AND kind = 'message' AND NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
END;

DROP TRIGGER IF EXISTS "{message}_search_update";

CREATE TRIGGER "{message}_search_update" AFTER UPDATE OF id, content, status ON "{message}" WHEN OLD.id IS NOT NEW.id OR OLD.content IS NOT NEW.content OR OLD.status IS NOT NEW.status
BEGIN
    INSERT INTO "{stem}_search" ("{stem}_search", rowid, words) SELECT 'delete', id, substr(OLD.content, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = OLD.id AND kind = 'message' AND OLD.content IS NOT NULL AND OLD.status <> 'pending' AND substr(OLD.content, 1, 7) <> 'enc:v1:';
    DELETE FROM "{stem}_search_row" WHERE row_id = OLD.id AND kind = 'message';
    INSERT OR REPLACE INTO "{stem}_search_row" (kind, row_id) SELECT 'message', NEW.id WHERE NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
    INSERT INTO "{stem}_search" (rowid, words) SELECT id, substr(NEW.content, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = NEW.id AND kind = 'message' AND NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
END;

DROP TRIGGER IF EXISTS "{message}_search_delete";

CREATE TRIGGER "{message}_search_delete" AFTER DELETE ON "{message}" WHEN OLD.content IS NOT NULL AND OLD.status <> 'pending' AND substr(OLD.content, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT INTO "{stem}_search" ("{stem}_search", rowid, words) SELECT 'delete', id, substr(OLD.content, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = OLD.id AND kind = 'message' AND OLD.content IS NOT NULL AND OLD.status <> 'pending' AND substr(OLD.content, 1, 7) <> 'enc:v1:';
    DELETE FROM "{stem}_search_row" WHERE row_id = OLD.id AND kind = 'message';
END;

DROP TRIGGER IF EXISTS "{tool_call}_search_insert";

CREATE TRIGGER "{tool_call}_search_insert" AFTER INSERT ON "{tool_call}" WHEN NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT OR REPLACE INTO "{stem}_search_row" (kind, row_id) SELECT 'tool_call', NEW.id WHERE NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
    INSERT INTO "{stem}_search" (rowid, words) SELECT id, substr(NEW.result, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = NEW.id AND kind = 'tool_call' AND NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
END;

DROP TRIGGER IF EXISTS "{tool_call}_search_update";

CREATE TRIGGER "{tool_call}_search_update" AFTER UPDATE OF id, result ON "{tool_call}" WHEN OLD.id IS NOT NEW.id OR OLD.result IS NOT NEW.result
BEGIN
    INSERT INTO "{stem}_search" ("{stem}_search", rowid, words) SELECT 'delete', id, substr(OLD.result, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = OLD.id AND kind = 'tool_call' AND OLD.result IS NOT NULL AND substr(OLD.result, 1, 7) <> 'enc:v1:';
    DELETE FROM "{stem}_search_row" WHERE row_id = OLD.id AND kind = 'tool_call';
    INSERT OR REPLACE INTO "{stem}_search_row" (kind, row_id) SELECT 'tool_call', NEW.id WHERE NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
    INSERT INTO "{stem}_search" (rowid, words) SELECT id, substr(NEW.result, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = NEW.id AND kind = 'tool_call' AND NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
END;

DROP TRIGGER IF EXISTS "{tool_call}_search_delete";

CREATE TRIGGER "{tool_call}_search_delete" AFTER DELETE ON "{tool_call}" WHEN OLD.result IS NOT NULL AND substr(OLD.result, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT INTO "{stem}_search" ("{stem}_search", rowid, words) SELECT 'delete', id, substr(OLD.result, 1, 200000) FROM "{stem}_search_row"
        WHERE row_id = OLD.id AND kind = 'tool_call' AND OLD.result IS NOT NULL AND substr(OLD.result, 1, 7) <> 'enc:v1:';
    DELETE FROM "{stem}_search_row" WHERE row_id = OLD.id AND kind = 'tool_call';
END;

INSERT OR IGNORE INTO "{stem}_search_row" (kind, row_id)
    SELECT 'message', id FROM "{message}" WHERE content IS NOT NULL AND status <> 'pending' AND substr(content, 1, 7) <> 'enc:v1:' ORDER BY created_at;

INSERT INTO "{stem}_search" (rowid, words)
    SELECT entry.id, substr(said.content, 1, 200000) FROM "{stem}_search_row" AS entry
    JOIN "{message}" AS said ON said.id = entry.row_id AND entry.kind = 'message'
    WHERE entry.id NOT IN (SELECT id FROM "{stem}_search_docsize") ORDER BY entry.id;

INSERT OR IGNORE INTO "{stem}_search_row" (kind, row_id)
    SELECT 'tool_call', id FROM "{tool_call}" WHERE result IS NOT NULL AND substr(result, 1, 7) <> 'enc:v1:' ORDER BY created_at;

INSERT INTO "{stem}_search" (rowid, words)
    SELECT entry.id, substr(said.result, 1, 200000) FROM "{stem}_search_row" AS entry
    JOIN "{tool_call}" AS said ON said.id = entry.row_id AND entry.kind = 'tool_call'
    WHERE entry.id NOT IN (SELECT id FROM "{stem}_search_docsize") ORDER BY entry.id;
