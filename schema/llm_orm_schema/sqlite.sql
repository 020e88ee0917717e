-- Made from llm_orm/records.py and llm_orm/views.py by: python -m llm_orm_schema.ddl

CREATE TABLE "llm_chat" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "model" TEXT,
    "provider" TEXT,
    "instructions" TEXT,
    "metadata" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL
);

CREATE INDEX "llm_chat_created_at" ON "llm_chat" ("created_at");

CREATE INDEX "llm_chat_updated_at" ON "llm_chat" ("updated_at");

CREATE TABLE "llm_message" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "chat_id" TEXT NOT NULL,
    "position" INTEGER NOT NULL,
    "role" TEXT NOT NULL,
    "status" TEXT NOT NULL,
    "content" TEXT,
    "content_raw" TEXT,
    "thinking_text" TEXT,
    "thinking_signature" TEXT,
    "thinking_tokens" INTEGER,
    "input_tokens" INTEGER,
    "output_tokens" INTEGER,
    "cached_tokens" INTEGER,
    "model_id" TEXT,
    "provider" TEXT,
    "request_key" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL,
    "parked_at" TIMESTAMPTZ,
    "cancelled_at" TIMESTAMPTZ,
    "owner" TEXT,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE,
    CONSTRAINT "llm_message_role_check" CHECK (role IN ('user', 'assistant', 'system', 'tool')),
    CONSTRAINT "llm_message_status_check" CHECK (status IN ('pending', 'completed', 'incomplete', 'failed'))
);

CREATE UNIQUE INDEX "llm_message_chat_id_position" ON "llm_message" ("chat_id", "position");

CREATE UNIQUE INDEX "llm_message_chat_id_request_key" ON "llm_message" ("chat_id", "request_key");

CREATE INDEX "llm_message_created_at" ON "llm_message" ("created_at");

CREATE UNIQUE INDEX "llm_message_one_pending" ON "llm_message" ("chat_id") WHERE status = 'pending';

CREATE TABLE "llm_tool_call" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "chat_id" TEXT NOT NULL,
    "message_id" TEXT,
    "turn_id" TEXT NOT NULL,
    "round" INTEGER NOT NULL,
    "position" INTEGER NOT NULL,
    "tool_call_id" TEXT NOT NULL,
    "name" TEXT NOT NULL,
    "arguments" TEXT NOT NULL,
    "thought" TEXT,
    "thought_signature" TEXT,
    "result" TEXT,
    "status" TEXT NOT NULL,
    "approval" TEXT,
    "error" TEXT,
    "duration_ms" INTEGER,
    "metadata" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "finished_at" TIMESTAMPTZ,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE SET NULL,
    CONSTRAINT "llm_tool_call_status_check" CHECK (status IN ('pending', 'running', 'completed', 'failed', 'rejected')),
    CONSTRAINT "llm_tool_call_approval_check" CHECK (approval IN ('required', 'approved', 'denied'))
);

CREATE UNIQUE INDEX "llm_tool_call_message_id_tool_call_id" ON "llm_tool_call" ("message_id", "tool_call_id");

CREATE INDEX "llm_tool_call_chat_id_turn_id" ON "llm_tool_call" ("chat_id", "turn_id");

CREATE INDEX "llm_tool_call_created_at" ON "llm_tool_call" ("created_at");

CREATE TABLE "llm_request" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "chat_id" TEXT,
    "message_id" TEXT,
    "turn_id" TEXT,
    "source" TEXT NOT NULL,
    "round" INTEGER NOT NULL,
    "attempt" INTEGER NOT NULL,
    "provider" TEXT NOT NULL,
    "model" TEXT NOT NULL,
    "status_code" INTEGER NOT NULL,
    "error" TEXT,
    "error_message" TEXT,
    "finish_reason" TEXT,
    "duration_ms" INTEGER NOT NULL,
    "first_token_ms" INTEGER,
    "streamed" INTEGER NOT NULL,
    "input_tokens" INTEGER NOT NULL,
    "output_tokens" INTEGER NOT NULL,
    "cached_tokens" INTEGER NOT NULL,
    "cache_write_tokens" INTEGER NOT NULL,
    "thinking_tokens" INTEGER NOT NULL,
    "usage_estimated" INTEGER NOT NULL,
    "cost" DECIMAL(20, 12),
    "correction_rounds" INTEGER,
    "provider_request_id" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE SET NULL,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE SET NULL,
    CONSTRAINT "llm_request_source_check" CHECK (source IN ('chat', 'response', 'run'))
);

CREATE INDEX "llm_request_message_id" ON "llm_request" ("message_id");

CREATE INDEX "llm_request_chat_id_created_at" ON "llm_request" ("chat_id", "created_at");

CREATE INDEX "llm_request_created_at" ON "llm_request" ("created_at");

CREATE INDEX "llm_request_turn_id" ON "llm_request" ("turn_id");

CREATE TABLE "llm_agent_session" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "agent_class" TEXT NOT NULL,
    "chat_id" TEXT NOT NULL,
    "metadata" TEXT,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE
);

CREATE UNIQUE INDEX "llm_agent_session_chat_id" ON "llm_agent_session" ("chat_id");

CREATE INDEX "llm_agent_session_agent_class" ON "llm_agent_session" ("agent_class");

CREATE INDEX "llm_agent_session_created_at" ON "llm_agent_session" ("created_at");

CREATE TABLE "llm_attachment" (
    "id" TEXT NOT NULL PRIMARY KEY,
    "message_id" TEXT NOT NULL,
    "position" INTEGER NOT NULL,
    "media_type" TEXT NOT NULL,
    "filename" TEXT,
    "size" INTEGER NOT NULL,
    "sha256" TEXT NOT NULL,
    "content" BLOB,
    "url" TEXT,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE CASCADE
);

CREATE UNIQUE INDEX "llm_attachment_message_id_position" ON "llm_attachment" ("message_id", "position");

CREATE VIEW "llm_usage_daily" AS
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
FROM "llm_request"
GROUP BY 1, 2, 3, 4;

CREATE VIEW "llm_usage_hourly" AS
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
FROM "llm_request"
GROUP BY 1, 2, 3, 4;

CREATE VIEW "llm_request_detail" AS
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
FROM "llm_request" AS request
LEFT JOIN "llm_agent_session" AS session ON session.chat_id = request.chat_id;

CREATE VIEW "llm_tool_usage_daily" AS
SELECT
    substr(created_at, 1, 10) AS day,
    name,
    COUNT(*) AS calls,
    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,
    AVG(duration_ms) AS duration_avg_ms,
    MAX(duration_ms) AS duration_max_ms
FROM "llm_tool_call"
GROUP BY 1, 2;

CREATE VIEW "llm_chat_cost" AS
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
FROM "llm_request"
GROUP BY chat_id;

CREATE VIRTUAL TABLE "llm_search" USING fts5(words, content = '', tokenize = 'unicode61 remove_diacritics 0');

CREATE TABLE "llm_search_row" (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    row_id TEXT NOT NULL,
    UNIQUE (row_id, kind)
);

CREATE TRIGGER "llm_message_search_insert" AFTER INSERT ON "llm_message" WHEN NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT OR REPLACE INTO "llm_search_row" (kind, row_id) SELECT 'message', NEW.id WHERE NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
    INSERT INTO "llm_search" (rowid, words) SELECT id, substr(NEW.content, 1, 200000) FROM "llm_search_row"
        WHERE row_id = NEW.id AND kind = 'message' AND NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
END;

CREATE TRIGGER "llm_message_search_update" AFTER UPDATE OF id, content, status ON "llm_message" WHEN OLD.id IS NOT NEW.id OR OLD.content IS NOT NEW.content OR OLD.status IS NOT NEW.status
BEGIN
    INSERT INTO "llm_search" ("llm_search", rowid, words) SELECT 'delete', id, substr(OLD.content, 1, 200000) FROM "llm_search_row"
        WHERE row_id = OLD.id AND kind = 'message' AND OLD.content IS NOT NULL AND OLD.status <> 'pending' AND substr(OLD.content, 1, 7) <> 'enc:v1:';
    DELETE FROM "llm_search_row" WHERE row_id = OLD.id AND kind = 'message';
    INSERT OR REPLACE INTO "llm_search_row" (kind, row_id) SELECT 'message', NEW.id WHERE NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
    INSERT INTO "llm_search" (rowid, words) SELECT id, substr(NEW.content, 1, 200000) FROM "llm_search_row"
        WHERE row_id = NEW.id AND kind = 'message' AND NEW.content IS NOT NULL AND NEW.status <> 'pending' AND substr(NEW.content, 1, 7) <> 'enc:v1:';
END;

CREATE TRIGGER "llm_message_search_delete" AFTER DELETE ON "llm_message" WHEN OLD.content IS NOT NULL AND OLD.status <> 'pending' AND substr(OLD.content, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT INTO "llm_search" ("llm_search", rowid, words) SELECT 'delete', id, substr(OLD.content, 1, 200000) FROM "llm_search_row"
        WHERE row_id = OLD.id AND kind = 'message' AND OLD.content IS NOT NULL AND OLD.status <> 'pending' AND substr(OLD.content, 1, 7) <> 'enc:v1:';
    DELETE FROM "llm_search_row" WHERE row_id = OLD.id AND kind = 'message';
END;

CREATE TRIGGER "llm_tool_call_search_insert" AFTER INSERT ON "llm_tool_call" WHEN NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT OR REPLACE INTO "llm_search_row" (kind, row_id) SELECT 'tool_call', NEW.id WHERE NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
    INSERT INTO "llm_search" (rowid, words) SELECT id, substr(NEW.result, 1, 200000) FROM "llm_search_row"
        WHERE row_id = NEW.id AND kind = 'tool_call' AND NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
END;

CREATE TRIGGER "llm_tool_call_search_update" AFTER UPDATE OF id, result ON "llm_tool_call" WHEN OLD.id IS NOT NEW.id OR OLD.result IS NOT NEW.result
BEGIN
    INSERT INTO "llm_search" ("llm_search", rowid, words) SELECT 'delete', id, substr(OLD.result, 1, 200000) FROM "llm_search_row"
        WHERE row_id = OLD.id AND kind = 'tool_call' AND OLD.result IS NOT NULL AND substr(OLD.result, 1, 7) <> 'enc:v1:';
    DELETE FROM "llm_search_row" WHERE row_id = OLD.id AND kind = 'tool_call';
    INSERT OR REPLACE INTO "llm_search_row" (kind, row_id) SELECT 'tool_call', NEW.id WHERE NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
    INSERT INTO "llm_search" (rowid, words) SELECT id, substr(NEW.result, 1, 200000) FROM "llm_search_row"
        WHERE row_id = NEW.id AND kind = 'tool_call' AND NEW.result IS NOT NULL AND substr(NEW.result, 1, 7) <> 'enc:v1:';
END;

CREATE TRIGGER "llm_tool_call_search_delete" AFTER DELETE ON "llm_tool_call" WHEN OLD.result IS NOT NULL AND substr(OLD.result, 1, 7) <> 'enc:v1:'
BEGIN
    INSERT INTO "llm_search" ("llm_search", rowid, words) SELECT 'delete', id, substr(OLD.result, 1, 200000) FROM "llm_search_row"
        WHERE row_id = OLD.id AND kind = 'tool_call' AND OLD.result IS NOT NULL AND substr(OLD.result, 1, 7) <> 'enc:v1:';
    DELETE FROM "llm_search_row" WHERE row_id = OLD.id AND kind = 'tool_call';
END;
