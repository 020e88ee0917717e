-- Made from llm_orm/records.py and llm_orm/views.py by: python -m llm_orm_schema.ddl

CREATE TABLE "llm_chat" (
    "id" UUID NOT NULL PRIMARY KEY,
    "model" TEXT,
    "provider" TEXT,
    "instructions" TEXT,
    "metadata" JSONB,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL
);

CREATE INDEX "llm_chat_created_at" ON "llm_chat" ("created_at");

CREATE INDEX "llm_chat_updated_at" ON "llm_chat" ("updated_at");

CREATE TABLE "llm_message" (
    "id" UUID NOT NULL PRIMARY KEY,
    "chat_id" UUID NOT NULL,
    "position" INTEGER NOT NULL,
    "role" TEXT NOT NULL,
    "status" TEXT NOT NULL,
    "content" TEXT,
    "content_raw" JSONB,
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
    "owner" UUID,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE,
    CONSTRAINT "llm_message_role_check" CHECK (role IN ('user', 'assistant', 'system', 'tool')),
    CONSTRAINT "llm_message_status_check" CHECK (status IN ('pending', 'completed', 'incomplete', 'failed'))
);

CREATE UNIQUE INDEX "llm_message_chat_id_position" ON "llm_message" ("chat_id", "position");

CREATE UNIQUE INDEX "llm_message_chat_id_request_key" ON "llm_message" ("chat_id", "request_key");

CREATE INDEX "llm_message_created_at" ON "llm_message" ("created_at");

CREATE UNIQUE INDEX "llm_message_one_pending" ON "llm_message" ("chat_id") WHERE status = 'pending';

CREATE INDEX "llm_message_search" ON "llm_message" USING GIN (to_tsvector('simple'::regconfig, regexp_replace("left"("content", 200000), '[\u0001-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b\u061d-\u061f\u066a-\u066d\u06d4\u0964\u0965\u0e4f\u0e5a\u0e5b\u0f04-\u0f14\u104a-\u104f\u1360-\u1368\u17d4-\u17d6\u17d8-\u17da\u1800-\u180a\u2000-\u206f\u20a0-\u20cf\u2190-\u245f\u2500-\u2775\u2794-\u2bff\u2e00-\u2e2e\u2e30-\u2e5d\u3000-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\ufe00-\ufe19\ufe30-\ufe6b\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\ufff9-\uffff\U0001f000-\U0001faff]+', ' ', 'g'))) WHERE content IS NOT NULL AND status <> 'pending' AND substr(content, 1, 7) <> 'enc:v1:';

CREATE TABLE "llm_tool_call" (
    "id" UUID NOT NULL PRIMARY KEY,
    "chat_id" UUID NOT NULL,
    "message_id" UUID,
    "turn_id" UUID NOT NULL,
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
    "metadata" JSONB,
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

CREATE INDEX "llm_tool_call_search" ON "llm_tool_call" USING GIN (to_tsvector('simple'::regconfig, regexp_replace("left"("result", 200000), '[\u0001-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b\u061d-\u061f\u066a-\u066d\u06d4\u0964\u0965\u0e4f\u0e5a\u0e5b\u0f04-\u0f14\u104a-\u104f\u1360-\u1368\u17d4-\u17d6\u17d8-\u17da\u1800-\u180a\u2000-\u206f\u20a0-\u20cf\u2190-\u245f\u2500-\u2775\u2794-\u2bff\u2e00-\u2e2e\u2e30-\u2e5d\u3000-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\ufe00-\ufe19\ufe30-\ufe6b\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\ufff9-\uffff\U0001f000-\U0001faff]+', ' ', 'g'))) WHERE result IS NOT NULL AND substr(result, 1, 7) <> 'enc:v1:';

CREATE TABLE "llm_request" (
    "id" UUID NOT NULL PRIMARY KEY,
    "chat_id" UUID,
    "message_id" UUID,
    "turn_id" UUID,
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
    "streamed" BOOLEAN NOT NULL,
    "input_tokens" INTEGER NOT NULL,
    "output_tokens" INTEGER NOT NULL,
    "cached_tokens" INTEGER NOT NULL,
    "cache_write_tokens" INTEGER NOT NULL,
    "thinking_tokens" INTEGER NOT NULL,
    "usage_estimated" BOOLEAN NOT NULL,
    "cost" NUMERIC(20, 12),
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
    "id" UUID NOT NULL PRIMARY KEY,
    "agent_class" TEXT NOT NULL,
    "chat_id" UUID NOT NULL,
    "metadata" JSONB,
    "created_at" TIMESTAMPTZ NOT NULL,
    "updated_at" TIMESTAMPTZ NOT NULL,
    FOREIGN KEY ("chat_id") REFERENCES "llm_chat" ("id") ON DELETE CASCADE
);

CREATE UNIQUE INDEX "llm_agent_session_chat_id" ON "llm_agent_session" ("chat_id");

CREATE INDEX "llm_agent_session_agent_class" ON "llm_agent_session" ("agent_class");

CREATE INDEX "llm_agent_session_created_at" ON "llm_agent_session" ("created_at");

CREATE TABLE "llm_attachment" (
    "id" UUID NOT NULL PRIMARY KEY,
    "message_id" UUID NOT NULL,
    "position" INTEGER NOT NULL,
    "media_type" TEXT NOT NULL,
    "filename" TEXT,
    "size" BIGINT NOT NULL,
    "sha256" TEXT NOT NULL,
    "content" BYTEA,
    "url" TEXT,
    FOREIGN KEY ("message_id") REFERENCES "llm_message" ("id") ON DELETE CASCADE
);

CREATE UNIQUE INDEX "llm_attachment_message_id_position" ON "llm_attachment" ("message_id", "position");

CREATE VIEW "llm_usage_daily" AS
SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
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
    COALESCE(SUM(cost), 0) AS cost,
    SUM(CASE WHEN cost IS NULL THEN 1 ELSE 0 END) AS unpriced_requests,
    SUM(duration_ms) AS duration_ms,
    MAX(duration_ms) AS duration_max_ms
FROM "llm_request"
GROUP BY 1, 2, 3, 4;

CREATE VIEW "llm_usage_hourly" AS
SELECT
    date_trunc('hour', created_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC' AS hour,
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
    COALESCE(SUM(cost), 0) AS cost,
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
    request.input_tokens::bigint + request.output_tokens AS total_tokens,
    session.agent_class,
    request.error IS NOT NULL AS is_failed,
    request.attempt > 1 AS is_retry,
    request.cost IS NULL AS is_unpriced
FROM "llm_request" AS request
LEFT JOIN "llm_agent_session" AS session ON session.chat_id = request.chat_id;

CREATE VIEW "llm_tool_usage_daily" AS
SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    name,
    COUNT(*) AS calls,
    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,
    AVG(duration_ms)::double precision AS duration_avg_ms,
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
    COALESCE(SUM(cost), 0) AS cost,
    SUM(CASE WHEN cost IS NULL THEN 1 ELSE 0 END) AS unpriced_requests,
    SUM(duration_ms) AS duration_ms,
    MAX(duration_ms) AS duration_max_ms,
    MIN(created_at) AS first_request_at,
    MAX(created_at) AS last_request_at
FROM "llm_request"
GROUP BY chat_id;
