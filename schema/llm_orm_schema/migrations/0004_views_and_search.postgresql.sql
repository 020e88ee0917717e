CREATE INDEX IF NOT EXISTS "{chat}_updated_at" ON "{chat}" ("updated_at");

CREATE INDEX IF NOT EXISTS "{request}_turn_id" ON "{request}" ("turn_id");

CREATE OR REPLACE VIEW "{stem}_usage_daily" AS
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
FROM "{request}"
GROUP BY 1, 2, 3, 4;

CREATE OR REPLACE VIEW "{stem}_usage_hourly" AS
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
FROM "{request}"
GROUP BY 1, 2, 3, 4;

CREATE OR REPLACE VIEW "{stem}_request_detail" AS
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
FROM "{request}" AS request
LEFT JOIN "{agent_session}" AS session ON session.chat_id = request.chat_id;

CREATE OR REPLACE VIEW "{stem}_tool_usage_daily" AS
SELECT
    (created_at AT TIME ZONE 'UTC')::date AS day,
    name,
    COUNT(*) AS calls,
    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,
    AVG(duration_ms)::double precision AS duration_avg_ms,
    MAX(duration_ms) AS duration_max_ms
FROM "{tool_call}"
GROUP BY 1, 2;

CREATE OR REPLACE VIEW "{stem}_chat_cost" AS
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
FROM "{request}"
GROUP BY chat_id;

CREATE INDEX IF NOT EXISTS "{message}_search" ON "{message}" USING GIN
    (to_tsvector('simple'::regconfig, regexp_replace("left"("content", 200000), '[\u0001-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b\u061d-\u061f\u066a-\u066d\u06d4\u0964\u0965\u0e4f\u0e5a\u0e5b\u0f04-\u0f14\u104a-\u104f\u1360-\u1368\u17d4-\u17d6\u17d8-\u17da\u1800-\u180a\u2000-\u206f\u20a0-\u20cf\u2190-\u245f\u2500-\u2775\u2794-\u2bff\u2e00-\u2e2e\u2e30-\u2e5d\u3000-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\ufe00-\ufe19\ufe30-\ufe6b\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\ufff9-\uffff\U0001f000-\U0001faff]+', ' ', 'g')))
    WHERE content IS NOT NULL AND status <> 'pending' AND substr(content, 1, 7) <> 'enc:v1:';

CREATE INDEX IF NOT EXISTS "{tool_call}_search" ON "{tool_call}" USING GIN
    (to_tsvector('simple'::regconfig, regexp_replace("left"("result", 200000), '[\u0001-\u002f\u003a-\u0040\u005b-\u0060\u007b-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u037e\u0387\u055a-\u055f\u0589\u058a\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u060c\u060d\u061b\u061d-\u061f\u066a-\u066d\u06d4\u0964\u0965\u0e4f\u0e5a\u0e5b\u0f04-\u0f14\u104a-\u104f\u1360-\u1368\u17d4-\u17d6\u17d8-\u17da\u1800-\u180a\u2000-\u206f\u20a0-\u20cf\u2190-\u245f\u2500-\u2775\u2794-\u2bff\u2e00-\u2e2e\u2e30-\u2e5d\u3000-\u3004\u3008-\u3020\u3030\u303d\u30a0\u30fb\ufe00-\ufe19\ufe30-\ufe6b\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\ufff9-\uffff\U0001f000-\U0001faff]+', ' ', 'g')))
    WHERE result IS NOT NULL AND substr(result, 1, 7) <> 'enc:v1:';
